"""Everything that a diagnosis can say. Each code is a heading of docs/troubleshooting.md, which says it at length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "note", "warning"]


@dataclass(frozen=True, slots=True)
class Code:
    """What all findings of one kind have in common."""

    severity: Severity
    effect: str
    """On the loss at the start of training."""
    fix: str


# The HTML page puts the paths of the diagnosis for MODEL, CKPT and NEW.
_CONVERT = "convert again: shardsmith to-dcp --base-model MODEL --output-dir NEW"
_REPAIR = "rebuild the buffers after to_empty(): shardsmith.hooks.InitialLoad(..., repair_buffers=True)"
_RANDOM = "as high as what these tensors contribute; the whole model at random starts at ln(vocabulary)"

CODES: dict[str, Code] = {
    # structure: names, shapes, files
    "incomplete-checkpoint": Code(
        "error",
        "torch loads a tensor with missing chunks without a word and leaves random values in the holes",
        f"copy the missing files again, or {_CONVERT}",
    ),
    "corrupt-checkpoint": Code("error", "unknown: nothing of it can be relied on", "copy the checkpoint again"),
    "unsafe-checkpoint": Code("error", "none: it was not read", "do not load it with torch; ask where it came from"),
    "missing-tensors": Code("error", f"what is missing stays random: {_RANDOM}", _CONVERT),
    "extra-tensors": Code(
        "warning",
        "a load ignores them: what they add, as LoRA does, is lost, or what they were meant for is missing elsewhere",
        "check that --base-model is the right model; merge LoRA matrices; a head of your own is loaded by your "
        "trainer, not by this model",
    ),
    "shape-differs": Code("error", "the load fails", "check that --base-model is the right model and size"),
    "kind-differs": Code(
        "error",
        "up to that of a random model: a load takes whole numbers, such as -128 to 127, or 8 bits, for the weights",
        "save before the weights are quantized, or with the model's quantization_config and the scales beside them",
    ),
    "wrong-layout": Code(
        "error",
        "the load fails with 'Missing key in checkpoint state_dict', or, where that is caught, nothing is loaded",
        "shardsmith to-dcp --layout flat (TorchTitan 0.1 and later) or --layout nested (before June 2025, flame)",
    ),
    "newer-step-beside": Code(
        "warning",
        "a trainer that resumes takes the newer step and never looks at this one",
        "move the other steps away, or start the run in a new folder",
    ),
    # values
    "damaged-values": Code("error", "unknown: bytes have changed since they were written", "copy the files again"),
    "not-finite": Code("error", "NaN from the first step", _CONVERT),
    "all-zero-tensor": Code("error", "the layers above see nothing of it", _CONVERT),
    "constant-values": Code("error", "slight to total, depending on the tensor", _CONVERT),
    "norms-are-one": Code("error", "slight, a few hundredths to tenths: the loss does not give it away", _CONVERT),
    "qk-norms-dropped": Code("error", "slight, a few hundredths: the loss does not give it away", _CONVERT),
    "rows-permuted": Code(
        "error",
        "about half of what there is to lose: attention sees rotated heads",
        "convert with the permutation for the layout that the trainer's RoPE wants (Hugging Face halves, native pairs)",
    ),
    "tensors-swapped": Code(
        "error",
        "depends on the tensors; shapes cannot show it",
        "give each tensor its own name where the checkpoint was made; the report says which holds which",
    ),
    "layers-reordered": Code(
        "error",
        "far up: every layer does the work of another",
        "sort layers by their number and not by their name as text, then convert again",
    ),
    "values-scaled": Code(
        "error",
        "depends on the tensors and the factor",
        "look for a scale that was left in or applied twice, such as that of quantised weights or of LoRA",
    ),
    "values-reordered": Code(
        "error",
        "depends on the tensor; a shape check cannot see it",
        "convert with the permutation that belongs to the change of layout, not with a plain reshape",
    ),
    "patches-not-permuted": Code(
        "error",
        "that of text hardly, that of images far up: the tower sees scrambled patches, and no shape shows it",
        "take the tensor from before the reshape, and let to-hf convert it; by hand: permute(0, 2, 3, 1), then reshape",
    ),
    "vocabulary-shifted": Code(
        "error", "most of what there is to lose: every token is taken for another", "train with the model's tokenizer"
    ),
    "tie-broken": Code(
        "error",
        "at or above ln(vocabulary): the output matrix is random",
        "tie the weights again before training, and save both names or neither",
    ),
    "embedding-differs": Code("error", "close to ln(vocabulary)", _CONVERT),
    "head-differs": Code("error", "at or above ln(vocabulary)", _CONVERT),
    "layer-not-loaded": Code("error", "noticeable, often taken for noise of the first steps", _CONVERT),
    "tensor-not-loaded": Code("error", _RANDOM, _CONVERT),
    "nothing-loaded": Code("error", "ln(vocabulary), that of a random model", "see what the trainer loads at start"),
    "values-differ": Code(
        "warning",
        "unknown: these are other weights",
        "check the revision of the model; if this checkpoint was trained, say --trained",
    ),
    "ema-equals-main": Code("warning", "none in training; the average is none", "update the EMA after each step"),
    "ema-never-moved": Code(
        "warning", "none in training; the average is still the base model", "keep the EMA in float32; update it"
    ),
    "ema-low-precision": Code(
        "warning",
        "none in training; with a decay near 1 an average of few bits never moves",
        "keep the EMA in float32",
    ),
    # model: config, tokenizer, buffers, logits
    "rope-differs": Code(
        "error",
        "a few tenths at short contexts, more at long ones",
        "train with the model's rope_theta (transformers 5: rope_parameters['rope_theta'])",
    ),
    "norm-eps-differs": Code(
        "error", "slight to nearly all, depending on the size of the activations", "train with the model's epsilon"
    ),
    "config-differs": Code("error", "depends on the setting", "train with the model's own config.json"),
    "tokenizer-differs": Code(
        "error", "most of what there is to lose: every token is taken for another", "train with the model's tokenizer"
    ),
    "tokenizer-too-large": Code(
        "error", "an index error, or silently wrong rows", "resize the embeddings, or use the model's tokenizer"
    ),
    "special-tokens-differ": Code(
        "warning",
        "slight: texts begin or end with a token that the model does not know as such",
        "train with the model's own eos and bos tokens",
    ),
    "buffer-zero": Code(
        "error",
        "rotary positions are lost: half of what there is to lose, and no state dict shows it",
        _REPAIR,
    ),
    "buffer-not-finite": Code("error", "NaN from the first step", _REPAIR),
    "buffer-differs": Code("error", "some tenths or more where positions are wrong; no state dict shows it", _REPAIR),
    "logits-differ": Code("error", "as measured in the report", "see the other findings; compare with the base model"),
    "loss-differs-from-logits": Code(
        "error",
        "the model's own loss is not the cross-entropy of its logits, so labels are shifted twice or not at all",
        "give the labels as the model's forward wants them: unshifted, if it shifts itself",
    ),
    # the start of training, from what the trainer reports
    "initial-load-off": Code(
        "error",
        "ln(vocabulary): nothing is loaded",
        "enable checkpointing and set initial_load_path; what the command line adds goes to --training-flags",
    ),
    "initial-load-skipped": Code(
        "error",
        "ln(vocabulary), or that of an old run: the trainer resumes from its own folder instead",
        "remove the folder, also if it is empty, or start the run in a new one",
    ),
    "another-checkpoint-loaded": Code("error", "that of the other checkpoint", "correct initial_load_path"),
    "labels-shifted-twice": Code(
        "error",
        "far up: the model is asked for the token after the next",
        "shift in the data set or in the loss, not in both",
    ),
    "positions-not-reset": Code(
        "error",
        "up with the number of documents in a sequence: each sees the ones before it",
        "reset position_ids and mask attention at the document borders of packed sequences",
    ),
    "auxiliary-loss-included": Code(
        "warning", "up by the auxiliary term; the model is right", "log the language model's loss apart"
    ),
    "labels-not-shifted": Code(
        "error",
        "that of copying: low for a model with tied embeddings, far up for others; the model does not learn to predict",
        "give the labels unshifted to a model that shifts them, or shift them once where the loss is your own",
    ),
    "padding-in-labels": Code(
        "warning",
        "that of padding is mixed in: up or down with the share of it",
        "set the labels of padding to -100",
    ),
    "loss-unmasked": Code(
        "warning",
        "that of masked tokens, such as prompts or padding, is mixed in",
        "pass the labels with -100, not the tokens, to the loss",
    ),
    "attention-mask-ignored": Code(
        "warning",
        "up: text sees the padding beside it, and positions may begin in the padding",
        "pass the attention_mask of the batch to the model's forward",
    ),
    "mean-of-rows": Code(
        "warning",
        "off by how much the rows differ in length; the model is right",
        "take one mean over all tokens of the batch, of all ranks and accumulation steps",
    ),
    "loss-summed": Code(
        "warning", "times the number of tokens; the model is right", "divide by the number of tokens with a label"
    ),
    "loss-scaled": Code(
        "warning",
        "times or divided by a whole number; the model is right",
        "divide by the number of accumulation steps (or ranks) exactly once",
    ),
    "start-loss-unexplained": Code(
        "warning",
        "the reported loss is none that this batch gives under any cause that is known here",
        "give the trainer's own first batch as --batch; compare masks, reduction and precision",
    ),
    # what is no fault
    "tied-weights": Code("note", "none", "nothing: one tensor under two names is counted once"),
    "non-persistent-buffers": Code("note", "none", "nothing: no state dict holds them, they come from the config"),
    "extra-head": Code("note", "none", "nothing: a head of the trainer's own, which the model does not have"),
    "not-compared": Code(
        "note",
        "none: a load of the model does not read it",
        "to-hf --average NAME makes a model of it, to compare that",
    ),
    "modules-not-there": Code(
        "note",
        "none, where they are the base model's",
        "nothing, if only the transformer was trained: to-hf takes the modules from the base model",
    ),
    "nested-layout": Code(
        "note",
        "none",
        "nothing, if the trainer wants it: flame and TorchTitan before June 2025 do; later ones want a flat one",
    ),
    "wrapped-names": Code(
        "note", "none", "nothing for Shardsmith; a plain dcp.load wants a model that is wrapped in the same way"
    ),
    "names-translated": Code("note", "none", "nothing: the tensors are the model's under other names"),
    "layout-converted": Code(
        "note", "none", "nothing: the values are the model's in another shape; to-hf converts them in the same way"
    ),
    "other-dtype": Code("note", "none", "nothing"),
    "rounded-values": Code("note", "about 0.001 or less", "nothing, if that dtype is meant"),
    "trained-weights": Code("note", "that of the trained model", "nothing: training moves weights"),
    "padding-differs": Code(
        "note", "none, if the labels of padding are -100", "nothing, if the trainer masks what it pads with"
    ),
    "harmless-settings": Code("note", "none", "nothing"),
}
