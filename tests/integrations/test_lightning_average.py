"""Files of a run with Lightning's WeightAveraging: main is what trains, the average is the average."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader

from shardsmith.cli import main
from shardsmith.diagnose import Questions, diagnose
from shardsmith.formats.by_path import detect_checkpoint_format
from shardsmith.inspection import inspect_checkpoint
from tests.families.tiny import all_families, make_tiny
from tests.integrations.lightning_runs import Ranks
from tests.ranks import run_on_ranks

FAMILIES = {family.kind: family for family in all_families()}
State = dict[str, Tensor]
CALLBACKS: dict[str, Callable[[], WeightAveraging]] = {
    "mean": WeightAveraging,
    "ema": lambda: EMAWeightAveraging(decay=0.5),
    "without buffers": lambda: EMAWeightAveraging(decay=0.5, use_buffers=False, update_starting_at_step=1),
}


class Module(LightningModule):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net = make_tiny(FAMILIES[kind])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.net(input_ids=batch, labels=batch).loss
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def whole(value: Tensor) -> Tensor:
    value = value.detach()
    return value.full_tensor().clone() if isinstance(value, DTensor) else value.clone()


class Noted(Callback):
    """Notes the weights that training goes on with."""

    state: State
    last: State

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.last = {name: whole(value) for name, value in pl_module.net.state_dict().items()}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.state = {name: whole(value) for name, value in pl_module.net.state_dict().items()}


def fit(
    kind: str,
    steps: int,
    callbacks: list[Callback],
    resumed: Path | None = None,
    *,
    module: Module | None = None,
    **options: Any,
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "logger": False}
        quiet = {"enable_progress_bar": False, "enable_model_summary": False}
        has_files = any(isinstance(one, ModelCheckpoint) for one in callbacks)
        trainer = Trainer(
            max_steps=steps,
            callbacks=callbacks,
            enable_checkpointing=has_files,
            use_distributed_sampler=False,
            **{**settings, **quiet, **options},
        )
        tokens = torch.arange(64).reshape(8, 8) % 16
        trainer.fit(module or Module(kind), DataLoader(tokens, batch_size=2), ckpt_path=resumed, weights_only=False)  # type: ignore[arg-type]


def trained(kind: str, callback: WeightAveraging, folder: Path) -> Path:
    """Return the file that Lightning writes at the third of four steps."""
    files = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    fit(kind, 4, [callback, files])
    return folder / "step=3.ckpt"


@pytest.mark.parametrize(
    ("kind", "callback"), [("LlamaForCausalLM", name) for name in CALLBACKS] + [("GPT2LMHeadModel", "ema")]
)
def test_main_and_the_average_are_those_that_lightning_loads(kind: str, callback: str, tmp_path: Path) -> None:
    make_tiny(FAMILIES[kind]).save_pretrained(tmp_path / "base")
    file = trained(kind, CALLBACKS[callback](), tmp_path / "run")
    given = ["--checkpoint", file, "--base-model", tmp_path / "base", "--dtype", "original"]
    assert main([*map(str, ["to-hf", *given, "--output-dir", tmp_path / "out"])]) == 0
    # What Lightning itself continues with.
    averaging, noted = CALLBACKS[callback](), Noted()
    fit(kind, 4, [averaging, noted], file)
    held = torch.load(file, weights_only=False)
    average = {name.removeprefix("net."): value for name, value in held["state_dict"].items()}
    for stem, state in (("model", noted.state), ("ema", average)):
        exported = load_file(tmp_path / "out" / f"{stem}.safetensors")
        assert exported
        assert all(torch.equal(value, state[name]) for name, value in exported.items()), stem
    assert not all(torch.equal(value, average[name]) for name, value in noted.state.items())


def test_all_commands_name_both(tmp_path: Path) -> None:
    kind = "LlamaForCausalLM"
    make_tiny(FAMILIES[kind]).save_pretrained(tmp_path / "base")
    file = trained(kind, CALLBACKS["ema"](), tmp_path / "run")
    assert "main is its current_model_state, ema its state_dict" in detect_checkpoint_format(file).reason
    assert [model.name for model in inspect_checkpoint(file).models] == ["main", "ema"]
    said = diagnose(file, tmp_path / "base", Questions(level="values", trained=True))
    assert said.faults == ()
    assert {"main", "ema"} <= said.levels[1].facts.keys()
    # The same dicts, of another origin: nothing says that state_dict is an average.
    held = torch.load(file, weights_only=False)
    del held["averaging_state"]
    torch.save(held, tmp_path / "other.ckpt")
    assert [model.name for model in inspect_checkpoint(tmp_path / "other.ckpt").models] == ["main"]
    assert "current_model_state" not in detect_checkpoint_format(tmp_path / "other.ckpt").reason


class Parallel(Module):
    """Sharded by tensor parallelism: with FSDP2 the callback cannot copy the model."""

    def configure_model(self) -> None:
        inner = self.net.model.layers[0].mlp
        if not isinstance(inner.up_proj.weight, DTensor):
            plan = {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel(), "down_proj": RowwiseParallel()}
            parallelize_module(inner, self.device_mesh["tensor_parallel"], plan)


def run_parallel(folder: Path, averaged: bool) -> None:
    """Fit on all ranks; the trained weights go to ``trained.pt``."""
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    files = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    noted, size = Noted(), dist.get_world_size()
    strategy = ModelParallelStrategy(1, size, process_group_backend="gloo")
    averaging = [EMAWeightAveraging(decay=0.5)] if averaged else []
    more = {"strategy": strategy, "devices": size, "plugins": [Ranks()]}
    fit("LlamaForCausalLM", 2, [files, noted, *averaging], module=Parallel("LlamaForCausalLM"), **more)
    if dist.get_rank() == 0:
        torch.save(noted.last, folder / "trained.pt")


@pytest.mark.parametrize("averaged", [False, True])
def test_a_sharded_folder_is_read_and_one_with_the_average_for_the_model_is_refused(
    averaged: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tiny(FAMILIES["LlamaForCausalLM"]).save_pretrained(tmp_path / "base")
    run_on_ranks(run_parallel, 2, tmp_path, tmp_path, averaged)
    folder = tmp_path / "step=2.ckpt"
    given = ["--checkpoint", folder, "--base-model", tmp_path / "base", "--dtype", "original"]
    status = main([*map(str, ["to-hf", *given, "--output-dir", tmp_path / "out"])])
    if averaged:
        assert status == 2
        assert "hold the average of Lightning's WeightAveraging" in " ".join(capsys.readouterr().err.split())
        return
    assert status == 0
    exported, trained = load_file(tmp_path / "out" / "model.safetensors"), torch.load(tmp_path / "trained.pt")
    assert exported
    assert all(torch.equal(value, trained[name]) for name, value in exported.items())
    assert diagnose(folder, tmp_path / "base", Questions(level="values")).faults == ()
