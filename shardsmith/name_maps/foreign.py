"""What to do about names that no name map brings under the base model's: of other trainers, or of several models."""

from __future__ import annotations

import re
from collections.abc import Collection

_TITAN = re.compile(r"(^|\.)(tok_embeddings|attention\.wq|attention\.qkv_linear|feed_forward\.w1)\.")
_OF_TORCHTUNE = ".sa_norm.scale"
_OF_MEGATRON = ".self_attention.linear_qkv.weight"


def advice_for_names(names: Collection[str]) -> str | None:
    """Return whose names these are, and what brings the tensors under the base model's; None if they say nothing."""
    if fused := next((name for name in sorted(names) if name.endswith(_OF_MEGATRON)), None):
        return (
            f"the checkpoint has {fused}, as models of Megatron, whose query, key and value rows are interleaved. Let "
            "export_ckpt of AutoBridge in Megatron Bridge write a Hugging Face directory"
        )
    found = sorted(filter(_TITAN.search, names), key=lambda name: ("tok_embeddings" not in name, name))
    if not found:
        return None
    named = found[0]
    # torchtune has the same name for the embedding, and others below it.
    if norm := next((name for name in sorted(names) if name.endswith(_OF_TORCHTUNE)), None):
        return (
            f"the checkpoint has {named} and {norm}, as models of torchtune, whose query and key rows may be in "
            "another order than the base model's. Let torchtune convert the state dict, with tune_to_hf of "
            "torchtune.models.convert_weights (for Qwen2: qwen2_tune_to_hf of torchtune.models.qwen2), save the result "
            "with torch.save, and give that file"
        )
    return (
        f"the checkpoint has {named}, as TorchTitan's own models: say which one it is, as in --titan-model llama3 "
        "--titan-flavor 8B, or keep the names: --names identity"
    )


def are_foreign(names: Collection[str]) -> bool:
    """Return whether some of these names are in no Hugging Face model, so that no base model need be asked."""
    return "tok_embeddings.weight" in names or any(name.endswith(_OF_MEGATRON) for name in names)


def rival_models(names: Collection[str], model: Collection[str]) -> tuple[list[str], list[str]]:
    """Return the dicts that each hold a whole model, such as a student and its teacher, and what leaves one of them.

    Args:
        names: Of the checkpoint's tensors.
        model: Of the base model's.

    Returns:
        What the names of each begin with, none if there are not two; and patterns for ``--drop`` that leave the first.
    """
    roots = dict.fromkeys(name.split(".", 1)[0] for name in names)
    whole = [root for root in roots if model and all(f"{root}.{name}" in names for name in model)]
    if len(whole) < 2:
        return [], []
    return whole, [f"'{root}.*'" if root not in names else f"'{root}'" for root in roots if root != whole[0]]
