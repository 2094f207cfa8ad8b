"""Trainers whose data ends before the last step that was asked for: ``last()`` is the step at which it ended."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from shardsmith.hooks import every, last
from shardsmith.integrations import lightning, transformers

TINY = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, eos_token_id=1
)
BATCHES, STEPS = 3, 7


class Data(IterableDataset[dict[str, Tensor]]):
    """Has its batches once, for one epoch."""

    def __init__(self) -> None:
        self._batches = iter([{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * BATCHES)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self._batches


class Module(LightningModule):
    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, Tensor], index: int) -> Any:
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    LlamaForCausalLM(TINY).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_trainer_exports_the_step_at_which_its_data_ended(tmp_path: Path, base: Path) -> None:
    model, out = LlamaForCausalLM(TINY), tmp_path / "run"
    arguments = TrainingArguments(
        str(out),
        max_steps=STEPS,
        per_device_train_batch_size=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        accelerator_config={"dispatch_batches": False},
    )
    hooks = transformers.CheckpointHooks(ema_decay=0.5, export=every(2) | last(), base_model=base, dtype="original")
    trainer = Trainer(model, arguments, train_dataset=Data(), callbacks=[hooks])
    trainer.train()
    assert trainer.state.global_step == BATCHES
    assert_exported(tmp_path / "run-hf", model)


@pytest.mark.filterwarnings("ignore")  # Lightning's own, of newer versions of torch
def test_lightning_saves_and_exports_the_step_at_which_its_data_ended(tmp_path: Path, base: Path) -> None:
    model = LlamaForCausalLM(TINY)
    hooks = lightning.CheckpointHooks(
        tmp_path / "run", save=every(2) | last(), export=every(2) | last(), base_model=base, dtype="original"
    )
    trainer = LightningTrainer(
        accelerator="cpu",
        max_steps=STEPS,
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[hooks],
        default_root_dir=tmp_path,
    )
    trainer.fit(Module(model), DataLoader(Data(), batch_size=1))
    assert trainer.global_step == BATCHES
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")) == ["step-2", "step-3"]
    assert_exported(tmp_path / "run" / "hf", model)


def assert_exported(directory: Path, model: LlamaForCausalLM) -> None:
    assert sorted(path.name for path in directory.glob("step-*")) == ["step-2", "step-3"]
    found = load_file(directory / "step-3" / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())
