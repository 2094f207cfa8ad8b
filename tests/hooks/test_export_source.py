"""Exports that are made from the run's checkpoints: they hold what an export of the live weights does."""

from __future__ import annotations

import json
import logging
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import fully_shard

from shardsmith.errors import RankFailedError, UsageError
from shardsmith.hooks import EMA, HFExport, Hooks, Schedule, ShardedSave, at, every, last, latest, multiples_of
from tests.hooks.test_export import Gate, read_files, tiny
from tests.hooks.test_export_faults import limit
from tests.ranks import run_on_ranks
from tests.trained_runs import TOKENS, build

RUNS: dict[str, dict[str, Any]] = {
    "qwen2-fsdp2": {},
    "odd-fsdp2": {"ema_as": "directory", "dtype": "original"},
    "qwen2-replicated": {"models": "ema", "dtype": {"*norm*": "float32", "*": "bfloat16"}},
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run on two ranks made of its live weights, and of its checkpoints, in the same ways. Read only."""
    root = tmp_path_factory.mktemp("exported")
    run_on_ranks(run_both_sources, 2, root, root)
    return root


def run_both_sources(directory: Path) -> None:
    for name, options in RUNS.items():
        train_and_export(directory / name, *name.split("-"), options)


def train_and_export(directory: Path, kind: str, sharding: str, options: dict[str, Any]) -> None:
    model = build(kind)
    if sharding == "fsdp2":
        for module in [*getattr(getattr(model, "model", None), "layers", ()), model]:
            fully_shard(module)
    ema = EMA(model, decay=0.5)
    save = ShardedSave(directory / "steps", model=model, ema=ema, when=every(2), keep=latest(1))
    sources: dict[str, dict[str, Any]] = {
        "live": {},
        "slices": {"source": "checkpoint", "checkpoints": save},
        "files": {"source": "checkpoint", "checkpoints": save, "write_mode": "files"},
    }
    exports = [
        HFExport(directory / name, model=model, ema=ema, when=at(2), max_shard_size="9KB", **options, **source)
        for name, source in sources.items()
    ]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Hooks(ema, save, *exports) as hooks:
        for step in range(1, 5):  # step 4 is saved, too, and would push step 2 out
            output = model(input_ids=TOKENS)
            (output if isinstance(output, torch.Tensor) else output.logits).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            hooks.step(step)


@pytest.mark.parametrize("mode", ["slices", "files"])
@pytest.mark.parametrize("run", RUNS)
def test_a_checkpoint_gives_what_the_live_weights_give(exported: Path, run: str, mode: str) -> None:
    assert contents(exported / run / mode) == contents(exported / run / "live")


def contents(directory: Path) -> dict[str, Any]:
    """What the files say; the order in which tensors lie in them is free."""
    found: dict[str, Any] = {}
    for name, content in read_files(directory).items():
        folder = name.split("/")[0]
        if name.endswith("shardsmith.json"):
            found[name] = {key: content[key] for key in ("step", "ema", "base_model")}
            for model, record in content["models"].items():
                found[f"{folder}/{model}"] = {key: record[key] for key in ("tied", "not_averaged", "tensors")}
        elif name.endswith(".safetensors"):
            stem = Path(name).name.replace(".", "-").split("-")[0]
            for key, tensor in load_file(directory / name).items():
                found[f"{folder}/{stem}/{key}"] = (tensor.dtype, tensor.shape, tensor.tolist())
        elif not name.endswith(".index.json"):
            found[name] = content
    return found


def from_checkpoints(directory: Path, model: nn.Module, **options: Any) -> tuple[ShardedSave, HFExport]:
    save = ShardedSave(directory / "steps", model=model, when=every(1), keep=latest(1))
    return save, export_of(directory, model, save, **options)


def export_of(directory: Path, model: nn.Module, save: ShardedSave, **options: Any) -> HFExport:
    kwargs = {"when": at(1, 2), "dtype": "original", "source": "checkpoint", **options}
    return HFExport(directory / "hf", model=model, checkpoints=save, **kwargs)


def weights_of(directory: Path) -> set[float]:
    return {
        value for tensor in load_file(directory / "model.safetensors").values() for value in tensor.unique().tolist()
    }


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()} - {".retention.json"}


@torch.no_grad()
def run_steps(hooks: Hooks, model: nn.Module, *steps: int) -> None:
    for step in steps:
        for parameter in model.parameters():
            parameter.fill_(step)
        hooks.step(step)


def test_a_checkpoint_that_is_to_be_exported_outlives_its_retention(tmp_path: Path) -> None:
    model, gate = tiny(), Gate()
    save, export = from_checkpoints(tmp_path, model, processor=gate)
    hooks = Hooks(save, export)
    run_steps(hooks, model, 1, 2, 3, 4)  # the export of step 1 does not get on, that of step 2 waits behind it
    assert gate.reached.wait(60)
    save.save(5)
    save.close()
    assert names(tmp_path / "steps") == {"step-1", "step-2", "step-5"}
    gate.open.set()
    export.close()
    assert {step: weights_of(tmp_path / "hf" / f"step-{step}") for step in (1, 2)} == {1: {1.0}, 2: {2.0}}


def test_what_was_held_goes_with_the_next_save(tmp_path: Path) -> None:
    model = tiny()
    save, export = from_checkpoints(tmp_path, model)
    with Hooks(save, export) as hooks:
        run_steps(hooks, model, 1, 2)
        export.wait()
        run_steps(hooks, model, 3)
    assert names(tmp_path / "steps") == {"step-3"}


@pytest.mark.parametrize(
    ("exports", "missing"),
    [(every(3) | at(4), "every(3)"), (at(4, 5), "at(5)"), (every(4) | last(), "last()")],
    ids=str,
)
def test_steps_that_are_never_saved_are_refused_at_once(tmp_path: Path, exports: Schedule, missing: str) -> None:
    model = tiny()
    save = ShardedSave(tmp_path / "steps", model=model, when=every(2))
    with pytest.raises(UsageError) as error:
        export_of(tmp_path, model, save, when=exports)
    assert f"due at {missing}, but checkpoints are saved at every(2)" in str(error.value)


def test_a_step_that_was_not_saved_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    model = tiny()
    save = ShardedSave(tmp_path / "steps", model=model, when=every(1))
    export = export_of(tmp_path, model, save, when=every(1))
    with pytest.raises(UsageError, match="Pass the hook that saves to Hooks before HFExport"):
        Hooks(export, save).step(1)
    save.save(1)
    export.export(1)
    export.close()
    assert names(tmp_path / "hf") == {"step-1"}


@pytest.mark.parametrize(
    "options",
    [{"source": "checkpoint"}, {"source": "disk"}, {"source": "live", "checkpoints": multiples_of}],
    ids=["checkpoint", "disk", "live"],
)
def test_a_source_that_makes_no_sense_is_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"source=|checkpoints="):
        HFExport(tmp_path, model=tiny(), when=at(1), **options)


def test_a_save_that_fails_fails_its_export_on_all_ranks_and_the_next_one_works(tmp_path: Path) -> None:
    run_on_ranks(run_failing_save, 2, tmp_path, tmp_path)
    assert names(tmp_path / "hf") == {"step-2"}
    assert weights_of(tmp_path / "hf" / "step-2") == {2.0}


def run_failing_save(directory: Path) -> None:
    logging.disable()
    model = nn.Linear(1024, 1024)
    fully_shard(model)
    save, export = from_checkpoints(directory, model)
    hooks = Hooks(save, export)
    if dist.get_rank() == 1:
        limit(resource.RLIMIT_FSIZE, 1 << 20)  # its shard has 2
    run_steps(hooks, model, 1)
    with pytest.raises(RankFailedError, match=r"step-1: was not saved: RankFailedError: writing step-1 failed"):
        export.wait()
    limit(resource.RLIMIT_FSIZE, resource.RLIM_INFINITY)
    with pytest.raises(RankFailedError, match="writing step-1 failed on"):
        save.on_step_end(2)
    run_steps(hooks, model, 2)
    hooks.close()


def test_stages_of_a_pipeline_are_exported_from_their_checkpoint(tmp_path: Path) -> None:
    run_on_ranks(run_pipeline, 2, tmp_path, tmp_path)
    assert load_file(tmp_path / "hf" / "step-2" / "model.safetensors").keys() == {"first.weight", "second.weight"}


def run_pipeline(directory: Path) -> None:
    logging.disable()
    stage = ("first", "second")[dist.get_rank()]
    model = nn.ModuleDict({stage: nn.Linear(3, 2, bias=False)})
    save, export = from_checkpoints(directory, model, when=at(2), source="auto")
    with Hooks(save, export) as hooks:
        run_steps(hooks, model, 1, 2)


def test_live_weights_are_exported_where_they_can_be(tmp_path: Path) -> None:
    model = tiny()
    save, export = from_checkpoints(tmp_path, model, source="auto")
    fill = [parameter.data.fill_(7) for parameter in model.parameters()]
    export.export(1)  # there is no checkpoint
    export.close()
    assert fill
    assert weights_of(tmp_path / "hf" / "step-1") == {7.0}
    assert json.loads((tmp_path / "hf" / "step-1" / "shardsmith.json").read_text())["source"] == "hf"
    save.close()
