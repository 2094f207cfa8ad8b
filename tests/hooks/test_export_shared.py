"""An export takes what a save of the same step has copied, and holds the same bytes as one that copies by itself."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardsmith.errors import CorruptCheckpointError, RankFailedError
from shardsmith.export.joint_export import JointExport
from shardsmith.export.live_writers import SliceWriter
from shardsmith.ground.layout import METADATA_FILE, PROVENANCE_FILE
from shardsmith.hooks import EMA, HFExport, Hook, Hooks, ShardedSave, at, every
from shardsmith.hooks.background import each_of
from shardsmith.manifest.checkpoints import committed_steps
from shardsmith.run_state import save as run_state_save
from shardsmith.sharding import staged_copy
from tests.hooks.test_export_rearranged import Model, Rearranged
from tests.hooks.training import build
from tests.ranks import run_on_ranks

EXPORTS: dict[str, dict[str, Any]] = {
    "same": {"dtype": "original"},
    "cast": {"dtype": "bfloat16"},
    "directories": {"dtype": {"*norm*": "float32", "*": "bfloat16"}, "ema_as": "directory"},
    "files": {"dtype": "bfloat16", "write_mode": "files", "max_shard_size": "1kB"},
}


class Run:
    """A model that trains, its saves and exports; and of each export how many bytes it copies, and boxes it shares."""

    def __init__(self, sharding: str, model: nn.Module | None = None) -> None:
        self.model = build(sharding) if model is None else model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.ema = EMA(self.model, decay=0.9)
        self.copied: dict[str, int] = {}
        self.shared: dict[str, int] = {}
        self._copy_into, self._stage = staged_copy.copy_into, JointExport.stage
        staged_copy.copy_into = self._counted  # type: ignore[assignment]
        JointExport.stage = lambda job, *args: self._staged(job, *args)  # type: ignore[method-assign]
        self._name = ""

    def save(self, directory: Path, **options: Any) -> ShardedSave:
        return ShardedSave(
            directory, model=self.model, optimizer=self.optimizer, ema=self.ema, when=every(1), **options
        )

    def export(self, directory: Path, **options: Any) -> HFExport:
        return HFExport(directory, model=self.model, ema=self.ema, **{"when": every(1), **options})

    def train(self, hooks: Hooks, step: int) -> None:
        nn.functional.cross_entropy(self.model(torch.arange(8).view(2, 4)).flatten(0, 1), torch.arange(8)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        hooks.step(step)

    def _counted(self, tensors: list[Tensor], copies: list[Tensor]) -> None:
        self.copied[self._name] = self.copied.get(self._name, 0) + sum(copy.nbytes for copy in copies)
        self._copy_into(tensors, copies)

    def _staged(self, job: JointExport, *args: Any) -> None:
        self._name = job.plan.output.parent.name
        try:
            self._stage(job, *args)
            self.shared[self._name] = len(job._shared)
        finally:
            self._name = ""


def files(directory: Path) -> dict[str, bytes]:
    found = [path for path in directory.rglob("*") if path.suffix in (".safetensors", ".distcp")]
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(found)}


@pytest.mark.parametrize("sharding", ["fsdp2", "ddp"])
def test_the_bytes_are_those_of_exports_and_saves_that_share_nothing(tmp_path: Path, sharding: str) -> None:
    run_on_ranks(run_both, 2, tmp_path, tmp_path, sharding)
    for name in EXPORTS:
        assert files(tmp_path / f"{name}-shared") == files(tmp_path / f"{name}-apart") != {}
    assert files(tmp_path / "saves-shared") == files(tmp_path / "saves-apart") != {}


def run_both(directory: Path, sharding: str) -> None:
    """Exports before all saves have nothing to share, nor has a save before all exports."""
    run = Run(sharding)
    apart = [run.export(directory / f"{name}-apart", **options) for name, options in EXPORTS.items()]
    shared = [run.export(directory / f"{name}-shared", **options) for name, options in EXPORTS.items()]
    saves = [run.save(directory / f"saves-{name}", compare_replicas="never") for name in ("apart", "shared")]
    hooks = Hooks(run.ema, *apart, saves[0], UsersOwn(), saves[1], *shared)
    for step in (1, 2):
        run.train(hooks, step)
        for export in (*apart, *shared):
            export.wait()
    hooks.close()
    copied = torch.tensor([[run.copied[f"{name}-{way}"] for name in EXPORTS] for way in ("apart", "shared")])
    dist.all_reduce(copied)
    if sharding == "fsdp2":  # each rank writes what it alone holds, in a save and in an export
        assert copied[1].tolist() == [0] * len(EXPORTS)
    assert (copied[1] < copied[0]).all()


class UsersOwn(Hook):
    """May change weights at any moment."""

    def __init__(self, change: Callable[[], object] = lambda: None) -> None:
        self._change = change

    def on_step_end(self, step: int) -> None:  # noqa: ARG002
        self._change()


def test_a_hook_between_that_changes_weights_is_seen_by_the_export(tmp_path: Path) -> None:
    run_on_ranks(run_changed_between, 2, tmp_path, tmp_path)
    found = load_file(tmp_path / "hf" / "step-1" / "model.safetensors")
    assert torch.equal(found["norm.weight"], torch.full((7,), 2.0))


def run_changed_between(directory: Path) -> None:
    run = Run("fsdp2")
    between = UsersOwn(lambda: local(run.model.norm.weight).data.fill_(2.0))
    hooks = Hooks(run.ema, run.save(directory / "saves"), between, run.export(directory / "hf", dtype="original"))
    run.train(hooks, 1)
    hooks.close()


WAYS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "fsdp1": ("fsdp1", {}, {}),
    "a save in windows": ("fsdp2", {"max_host_memory": "1kB"}, {}),
    "an export in windows": ("fsdp2", {}, {"max_host_memory": "1kB"}),
    "a save that overlaps": ("fsdp2", {"staging": "overlap"}, {}),
    "an export that overlaps": ("fsdp2", {}, {"staging": "overlap"}),
    "a save that does not copy": ("fsdp2", {"async_mode": "disabled"}, {}),
}


def test_where_nothing_is_shared_the_export_copies_by_itself(tmp_path: Path) -> None:
    run_on_ranks(run_unshared, 2, tmp_path, tmp_path)
    for way in WAYS:
        assert files(tmp_path / way / "hf") == files(tmp_path / way / "apart") != {}


def run_unshared(folder: Path) -> None:
    for way, options in WAYS.items():
        check_unshared(folder / way, *options)


def check_unshared(directory: Path, sharding: str, of_save: dict[str, Any], of_export: dict[str, Any]) -> None:
    run = Run(sharding)
    apart, export = run.export(directory / "apart"), run.export(directory / "hf", **of_export)
    hooks = Hooks(run.ema, apart, run.save(directory / "saves", **of_save), export)
    for step in (1, 2):
        run.train(hooks, step)
        export.wait()
    hooks.close()
    assert run.shared == {"apart": 0, "hf": 0}


def test_tensors_that_are_cut_up_and_rearranged_come_out_the_same(tmp_path: Path) -> None:
    run_on_ranks(run_rearranged, 2, tmp_path, tmp_path)
    assert files(tmp_path / "hf") == files(tmp_path / "apart") != {}


def run_rearranged(directory: Path) -> None:
    run = Run("", Model())
    options: dict[str, Any] = {"names": Rearranged(), "dtype": "bfloat16"}
    apart, export = run.export(directory / "apart", **options), run.export(directory / "hf", **options)
    hooks = Hooks(run.ema, apart, run.save(directory / "saves"), export)
    hooks.step(1)
    hooks.close()


def test_a_save_does_not_write_over_what_a_slow_export_still_reads(tmp_path: Path) -> None:
    run_on_ranks(run_slow_export, 2, tmp_path, tmp_path)
    assert committed_steps(tmp_path / "saves", METADATA_FILE) == [1, 2, 3]


def run_slow_export(directory: Path) -> None:
    """The exports of the first two steps write only when all saves have copied."""
    run = Run("fsdp2")
    goes_on = threading.Event()
    write, commit = SliceWriter.write, JointExport.commit
    readers: list[int] = []

    def slow(writer: SliceWriter, *args: Any) -> None:
        assert goes_on.wait(60)
        write(writer, *args)

    def committed(job: JointExport) -> Path:
        readers.append(len(buffer._readers))
        return commit(job)

    save, export = run.save(directory / "saves"), run.export(directory / "hf", dtype="original", when=at(1, 2))
    hooks, steps = Hooks(run.ema, save, export), dict[int, dict[str, Tensor]]()
    buffer = save._buffer
    assert buffer is not None
    SliceWriter.write = slow  # type: ignore[method-assign]
    JointExport.commit = committed  # type: ignore[method-assign]
    for step in (1, 2, 3):
        run.train(hooks, step)
        steps[step] = {name: whole(tensor) for name, tensor in run.model.state_dict().items()}
    goes_on.set()
    hooks.close()
    assert readers == [0, 0]
    dist.barrier()
    for step in (1, 2):
        found = load_file(directory / "hf" / f"step-{step}" / "model.safetensors")
        assert all(torch.equal(steps[step][name], tensor) for name, tensor in found.items()), step


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


FAILING = ["staging", "writing", "saving"]


def test_what_fails_gives_back_what_it_borrowed_and_fails_nothing_else(tmp_path: Path) -> None:
    run_on_ranks(run_failing, 2, tmp_path, tmp_path)
    for kind in FAILING:
        saves, hf, is_save = tmp_path / kind / "saves", tmp_path / kind / "hf", kind == "saving"
        assert committed_steps(saves, METADATA_FILE) == ([2] if is_save else [1, 2])
        assert committed_steps(hf, PROVENANCE_FILE) == ([1, 2] if is_save else [2])
        shared, apart = files(hf), files(tmp_path / kind / "apart")
        assert shared == {name: apart[name] for name in shared}


def run_failing(directory: Path) -> None:
    logging.disable()
    for kind in FAILING:
        check_failing(directory / kind, kind)


def check_failing(directory: Path, kind: str) -> None:
    """On rank 1 the first export cannot be staged or not be written, or the first save not be written."""
    run = Run("fsdp2")
    apart, save, export = run.export(directory / "apart"), run.save(directory / "saves"), run.export(directory / "hf")
    hooks = Hooks(run.ema, apart, save, export)

    def refuse(*_: Any, **__: Any) -> Any:
        raise CorruptCheckpointError(directory, "is not what it was")

    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1 and kind == "staging":
            stage = JointExport._stage
            calls = iter([stage, refuse])  # of the export apart, and of the one that shares
            patch.setattr(JointExport, "_stage", lambda *args: next(calls)(*args))
        if dist.get_rank() == 1 and kind == "writing":
            patch.setattr(export._source._writer, "write", refuse)  # type: ignore[union-attr]
        if dist.get_rank() == 1 and kind == "saving":
            patch.setattr(run_state_save, "write_rank_file", refuse)
        with pytest.raises(RankFailedError, match=r"rank 1: .*is not what it was"):  # noqa: PT012
            run.train(hooks, 1)
            each_of([export.wait, save._report])
    run.train(hooks, 2)
    hooks.close()
