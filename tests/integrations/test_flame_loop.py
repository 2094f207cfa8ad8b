"""A loop that has the structure of flame's: docs/torchtitan.md says how hooks attach to it.

One function with its own config makes the model on meta, shards it, and trains in a loop of its own. TorchTitan's
containers hold the optimizer, and a checkpoint manager, whose class has another constructor than that of later
versions, saves the model under ``model.`` and is told the step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from shardsmith import load_initial
from shardsmith.cli import main as shardsmith
from shardsmith.hooks import EMA, HFExport, Hooks, InitialLoad, ShardedSave, every, last
from tests.ranks import run_on_ranks

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "eos_token_id": 1}

TOKENS = torch.arange(24).view(2, 12) * 5 % 64


@dataclass
class JobConfig:
    """What is set in flame's."""

    base: Path
    dump_folder: Path
    steps: int = 4
    interval: int = 2
    batches: int | None = None
    whole: bool = False
    """Whether our hooks save and resume, in the place of its manager."""


@dataclass
class TrainState(Stateful):
    step: int = 0

    def state_dict(self) -> dict[str, Any]:
        return {"step": torch.tensor(self.step)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step = int(state_dict["step"])


class OptimizersContainer:
    """One optimizer for each part of the model."""

    def __init__(self, model_parts: list[nn.Module]) -> None:
        self.optimizers = [torch.optim.AdamW(part.parameters(), lr=1e-2) for part in model_parts]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()


class CheckpointManager:
    """Saves and loads in ``checkpoint/step-<n>``; ``force`` saves the last step."""

    def __init__(
        self, *, model_parts: list[nn.Module], optimizers: Any, states: dict[str, Any], job_config: JobConfig
    ) -> None:
        self._model, self._optimizer, self._states = model_parts[0], optimizers.optimizers[0], states
        self._folder, self._interval = job_config.dump_folder / "checkpoint", job_config.interval

    def _state(self) -> dict[str, Any]:
        optimizer = get_optimizer_state_dict(self._model, self._optimizer)
        return {"model": get_model_state_dict(self._model), "optimizer": optimizer, **self._states}

    def save(self, step: int, force: bool = False) -> None:
        if force or step % self._interval == 0:
            dcp.save(self._state(), checkpoint_id=str(self._folder / f"step-{step}"))


def main(job_config: JobConfig) -> nn.Module:
    """As in flame; the lines with ``hooks`` are those of the docs."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(job_config.base))
        model.apply(lambda module: setattr(module, "_is_hf_initialized", False))
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        model.post_init()
        for buffer in model.buffers():  # as in flame with transformers 4, which leaves them as they are in memory
            buffer.zero_()
    model_parts = [model]
    optimizers, train_state = OptimizersContainer(model_parts), TrainState()
    checkpoint = CheckpointManager(
        model_parts=model_parts, optimizers=optimizers, states={"train_state": train_state}, job_config=job_config
    )
    if train_state.step == 0 and not job_config.whole:
        load_initial(job_config.base, model=model, repair_buffers=True)
    ema = EMA(model, decay=0.5)
    export = HFExport(
        job_config.dump_folder / "hf",
        model=model,
        ema=ema,
        base_model=job_config.base,
        when=every(2) | last(),
        dtype="original",
    )
    if job_config.whole:
        save = ShardedSave(
            job_config.dump_folder / "whole",
            model=model,
            optimizer=optimizers.optimizers,
            ema=ema,
            when=every(job_config.interval) | last(),
        )
        hooks = Hooks(InitialLoad(job_config.base, model=model, repair_buffers=True), ema, save, export)
        train_state.step = hooks.resume()
    else:
        hooks = Hooks(ema, export)
    data_iterator = batches_of(job_config.batches, train_state.step)
    with hooks:
        while train_state.step < job_config.steps:
            train_state.step += 1
            optimizers.zero_grad()
            model(input_ids=(batch := next(data_iterator)), labels=batch).loss.backward()
            optimizers.step()
            if not job_config.whole:
                checkpoint.save(train_state.step, force=train_state.step == job_config.steps)
            hooks.step(train_state.step)
    return model


def batches_of(count: int | None, begun: int) -> Iterator[Tensor]:
    """Without ``count`` without an end."""
    steps: Iterable[int] = range(begun, 1000 if count is None else count)
    yield from (torch.arange(16).view(2, 8) * (step + dist.get_rank() + 1) % SIZES["vocab_size"] for step in steps)


def gathered(model: nn.Module) -> dict[str, Tensor]:
    whole: dict[str, Tensor] = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return whole


def run_jobs(base: Path, directory: Path) -> None:
    model = main(JobConfig(base, directory / "own"))
    weights, loss = gathered(model), model(input_ids=TOKENS, labels=TOKENS).loss.item()
    if dist.get_rank() == 0:
        torch.save({"weights": weights, "loss": loss}, directory / "live.pt")
    main(JobConfig(base, directory / "in-two", steps=2, whole=True))
    main(JobConfig(base, directory / "in-two", whole=True))
    with contextlib.suppress(StopIteration):
        main(JobConfig(base, directory / "ended", batches=3))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("flame")
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES, **heads)).save_pretrained(root / "base")
    run_on_ranks(run_jobs, 2, root, root / "base", root)
    return root


def test_exports_have_the_weights_of_the_run(runs: Path) -> None:
    found = load_file(runs / "own" / "hf" / "step-4" / "model.safetensors")
    live = torch.load(runs / "live.pt", weights_only=True)
    assert found.keys() == live["weights"].keys()
    assert all(torch.equal(found[name], value) for name, value in live["weights"].items())


def test_exports_have_the_loss_of_the_run_whose_buffers_were_lost_before_the_load(runs: Path) -> None:
    exported = LlamaForCausalLM.from_pretrained(runs / "own" / "hf" / "step-4")
    loss = exported(input_ids=TOKENS, labels=TOKENS).loss.item()
    assert torch.load(runs / "live.pt", weights_only=True)["loss"] == pytest.approx(loss, abs=1e-5)


def test_what_its_manager_saves_is_exported_by_to_hf(runs: Path, tmp_path: Path) -> None:
    step, base = runs / "own" / "checkpoint" / "step-4", runs / "base"
    places = ["--checkpoint", str(step), "--base-model", str(base), "--output-dir", str(tmp_path / "out")]
    assert shardsmith(["to-hf", *places, "--dtype", "original", "--quiet"]) == 0
    found, expected = (load_file(d / "model.safetensors") for d in (tmp_path / "out", runs / "own" / "hf" / "step-4"))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_run_that_our_hooks_resume_goes_on_as_the_uninterrupted_one(runs: Path) -> None:
    for name in ("model.safetensors", "ema.safetensors"):
        whole, in_two = (load_file(runs / run / "hf" / "step-4" / name) for run in ("own", "in-two"))
        assert all(torch.equal(in_two[key], value) for key, value in whole.items())


def test_data_that_ends_breaks_the_loop_off_without_a_last_export(runs: Path) -> None:
    """``next`` raises in the loop: only a resumed run comes to a last step."""
    assert sorted(path.name for path in (runs / "ended" / "hf").glob("step-*")) == ["step-2"]
