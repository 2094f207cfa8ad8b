"""Many real ranks and many tensors on one machine: they save, agree on a stop, export and resume; torch reads it all.

Each rank is a process, forked from one that has imported everything. The model is HSDP of two shards, so that each of
its tensors lies on every rank, or, cut into stages of a pipeline, on every rank of its stage. A checkpoint has two
boxes of each.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import tyro
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from shardsmith.ground import liveness
from shardsmith.ground.meeting import START_SECS
from shardsmith.hooks import HFExport, Hooks, ShardedSave, at

_SHARDS = 2
_EXPERTS = 64
_KINDS = ("gate_proj", "up_proj", "down_proj")
_ASKED_AT = 2
"""The step at which one rank asks for a stop."""
_TIMEOUT_SECS = 3600
_ANSWER_SECS = 120.0
"""More ranks than cores: 0.2 s of the processor, in which a rank cannot answer, may take many seconds."""


def name_of(number: int) -> str:
    """Return the name of a tensor."""
    layer, of_layer = divmod(number, _EXPERTS * len(_KINDS))
    expert, kind = divmod(of_layer, len(_KINDS))
    return f"layers.{layer}.experts.{expert}.{_KINDS[kind]}"


class ManyTensors(nn.Module):
    """A model of many tensors of two elements, of which a rank has one of each, or a stage of such a model."""

    def __init__(self, numbers: range, values: Tensor, mesh: DeviceMesh) -> None:
        """``values``: of this rank, one for each of the tensors with these numbers, which shares memory with them."""
        super().__init__()
        modules: dict[str, nn.Module] = {"": self}
        for number, value in zip(numbers, values[:, None].unbind(), strict=True):
            path, _, kind = name_of(number).rpartition(".")
            if path not in modules:
                above, own = "", ""
                for part in path.split("."):
                    own = f"{above}.{part}".lstrip(".")
                    if own not in modules:
                        modules[own] = nn.Module()
                        modules[above].add_module(part, modules[own])
                    above = own
            whole = DTensor.from_local(value, mesh, [Replicate(), Shard(0)], run_check=False)
            modules[path].register_parameter(kind, nn.Parameter(whole))


def values_at(step: int, tensors: int) -> Tensor:
    """Return what all ranks hold together after a step, two elements of each tensor: exact in float32."""
    return torch.arange(_SHARDS * tensors, dtype=torch.float32).view(tensors, _SHARDS) + step


class _Timed:
    """Seconds by the clock and of this rank's processor, by what was done."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[float, float]] = {}

    @contextlib.contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        began, used = time.monotonic(), time.process_time()
        yield
        self.found[what] = time.monotonic() - began, time.process_time() - used


def run_rank(rank: int, ranks: int, tensors: int, stages: int, directory: Path, port: int) -> None:
    """Be one rank, and leave what was measured. ``port``: of the job's store."""
    torch.set_num_threads(1)
    liveness.ANSWER_SECS = _ANSWER_SECS
    timeout = timedelta(seconds=_TIMEOUT_SECS)
    store = dist.TCPStore("127.0.0.1", port, timeout=timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timeout)
    whole = init_device_mesh("cpu", (stages, ranks // (stages * _SHARDS), _SHARDS), mesh_dim_names=("pp", "dp", "fsdp"))
    mesh = whole["dp", "fsdp"]
    stage = whole.get_local_rank("pp")
    numbers = range(tensors * stage // stages, tensors * (stage + 1) // stages)
    own = slice(numbers.start, numbers.stop), mesh.get_local_rank("fsdp")
    values = values_at(0, tensors)[own].clone()
    timed = _Timed()
    with timed("making the model"):
        model = ManyTensors(numbers, values, mesh)
    with timed("making the hooks"):
        hooks = _hooks(model, directory, stages)
    with timed("resume without a step"):
        assert hooks.resume() == 0
    step = 0
    while not hooks.should_stop:
        step += 1
        with torch.no_grad():
            values += 1
        if step == _ASKED_AT and rank == ranks - 1:
            hooks.request_stop()
        with timed("the first step, which saves and exports" if step == 1 else "the last step, which saves, too"):
            hooks.step(step)
    with timed("end of the background work"):
        hooks.close()
    values.zero_()
    again = _hooks(model, directory, stages)
    with timed("resume"):
        assert again.resume() == step
    assert torch.equal(values, values_at(step, tensors)[own])
    again.close()
    found = {"step": step, "seconds": timed.found, "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    (directory / f"rank-{rank}.json").write_text(json.dumps(found))
    dist.barrier()


def _hold_store(pipe: Connection) -> None:
    """Hold the job's store, as torchrun does, until the ranks have ended. Not in the process that is forked."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipe.send(store.port)
    pipe.recv()


def _hooks(model: nn.Module, directory: Path, stages: int) -> Hooks:
    save = ShardedSave(directory / "run", model=model, when=at(1), timeout_secs=_TIMEOUT_SECS)
    export = HFExport(
        directory / "hf", model=model, when=at(1), dtype="float32", stages=stages > 1, timeout_secs=_TIMEOUT_SECS
    )
    return Hooks(save, export)


def measure(ranks: int, tensors: int, stages: int, directory: Path) -> dict[str, Any]:
    """Run all ranks; compare the save and the export with what they should hold, as torch and safetensors read them.

    Returns:
        By what was done, the longest time by the clock and the longest of a rank's processor; the largest memory.

    Raises:
        RuntimeError: a rank failed, ranks stopped at different steps, or a value is not what it should be.
    """
    os.environ.setdefault(START_SECS, str(_TIMEOUT_SECS))  # more ranks than cores: some come minutes after others
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    launcher = fork.Process(target=_hold_store, args=(theirs,))
    launcher.start()
    arguments = ranks, tensors, stages, directory, ours.recv()
    processes = [fork.Process(target=run_rank, args=(rank, *arguments)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    ours.send("ended")
    launcher.join()
    if failed := [rank for rank, process in enumerate(processes) if process.exitcode]:
        raise RuntimeError(f"ranks {failed} of {ranks} failed")
    found = [json.loads((directory / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
    steps = {one["step"] for one in found}
    if len(steps) > 1:
        raise RuntimeError(f"ranks stopped after different steps: {steps}")
    (step,) = steps
    of_ranks = [one["seconds"] for one in found]
    seconds = {what: tuple(max(of_rank[what][i] for of_rank in of_ranks) for i in (0, 1)) for what in of_ranks[0]}
    timed = _Timed()
    with timed("torch reads the step, one process"):
        _require_equal(_by_torch(directory / "run" / f"step-{step}"), step, tensors)
    with timed("safetensors reads the export"):
        _require_equal(load_file(directory / "hf" / "step-1" / "model.safetensors"), 1, tensors)
    return {"step": step, "seconds": {**seconds, **timed.found}, "memory": max(one["memory"] for one in found)}


def _by_torch(step: Path) -> dict[str, Tensor]:
    state: dict[str, Any] = {}
    _load_state_dict(state, dcp.FileSystemReader(step), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return {key: value for key, value in state.items() if key.startswith("layers.")}


def _require_equal(found: dict[str, Tensor], step: int, tensors: int) -> None:
    expected = values_at(step, tensors)
    if found.keys() != {name_of(number) for number in range(tensors)}:
        raise RuntimeError(f"{len(found)} tensors, expected {tensors}")
    wrong = [name for n, row in enumerate(expected) if not torch.equal(found[name := name_of(n)], row)]
    if wrong:
        raise RuntimeError(f"{len(wrong)} of {tensors} tensors have other values, such as {wrong[0]}")


def main(ranks: int = 64, tensors: int = 12_500, stages: int = 1, directory: Path | None = None) -> None:
    """Print what it took.

    Args:
        ranks: How many, a multiple of twice the stages.
        tensors: Of the model.
        stages: Of a pipeline into which the model is cut; 1: each rank has a part of each tensor.
        directory: Where to write; a temporary directory if not given.
    """
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        found = measure(ranks, tensors, stages, Path(scratch))
    console = Console(soft_wrap=True, width=150)
    cut = f" in {stages} stages" if stages > 1 else ""
    title = f"{ranks} ranks, {tensors:,} tensors{cut}, stopped together after step {found['step']}"
    table = Table("", "seconds, slowest rank", "processor seconds, busiest rank", title=title)
    for what, (clock, processor) in found["seconds"].items():
        table.add_row(what, f"{clock:.1f}", f"{processor:.1f}")
    console.print(table)
    console.print(f"memory of a rank at most {found['memory'] / 1e6:.0f} MB, what it shares with the others included")


if __name__ == "__main__":
    tyro.cli(main)
