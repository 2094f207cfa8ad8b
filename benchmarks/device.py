"""What exports and saves cost a training on one device: waits beside the bare copy, and steps while they are written.

A transformer in bfloat16 with fused AdamW, sharded over the one rank by FSDP2, as a rank of a larger job has its shard.
Every contender writes the same weights, after an uncounted first round in which buffers are made.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import BlockingAsyncStager, DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from benchmarks.rank_processes import spawn_ranks
from benchmarks.steps import Stepping
from shardsmith.hooks import HFExport, ShardedSave, at

# Enough of a contender once this much time has passed; on a fast disk all runs are made.
_ENOUGH_SECS = 12
"""Of one contender, on a slow disk."""
# Never by itself: the benchmark says when.
NEVER = at(10**9)
BARE_EXPORT = "a bare copy of the weights into pinned memory"
BARE_SAVE = "a bare copy of weights and moments into pinned memory"
DISK = "a plain write of the weights, with fsync"
EXPORT = "HFExport"
SAVE = "ShardedSave"
EXPORT_OVERLAP = "HFExport, overlap"
SAVE_OVERLAP = "ShardedSave, overlap"
ASYNC = "dcp.async_save, pinned staging"
ASYNC_BLOCKING = "dcp.async_save, BlockingAsyncStager"
CONSOLIDATED = "HuggingFaceStorageWriter, consolidated"
GATHER = "full gather, torch.save"


def measure_device(console: Console, work: Path, device: str, parameters: int, runs: int) -> dict[str, Any]:
    """Measure, print the table; the figures. Times in seconds, medians."""
    console.print(
        f"a transformer of about {parameters / 1e6:.0f} M parameters in bfloat16 on {device}, one rank, in {work}"
    )
    # Both backends: the hooks use Gloo beside the training's own group.
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    found = spawn_ranks(_bench, 1, work / "device", device, parameters, runs, backend=backend)
    table = Table("way", "training waits", "in all")
    for name, figures in found["ways"].items():
        table.add_row(name, f"{figures['stall']:.4f} s", f"{figures['seconds']:.4f} s")
    console.print(table)
    for name in sorted({ASYNC, ASYNC_BLOCKING} - found["ways"].keys()):
        console.print(f"{name}: does not work with torch {torch.__version__}")
    for name, value in found["ratios"].items():
        console.print(f"{name}: {value}")
    steps = Table("training steps", "median", "p99", "p99 pause of the launching thread", "steps")
    for name, figures in found["steps"].items():
        steps.add_row(
            name, *(f"{figures[key] * 1e3:.2f} ms" for key in ("median", "p99", "pause")), f"{figures['count']}"
        )
    console.print(steps)
    return found


class _Transformer(nn.Module):
    """Of plain torch, so that the library of no model decides what is measured."""

    def __init__(self, layers: int, width: int, words: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, width // 64, 4 * width, 0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.head = nn.Linear(width, words, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        logits: Tensor = self.head(hidden)
        return logits


def _model(parameters: int, device: str) -> nn.Module:
    width, words = (2048, 32000) if parameters >= 250_000_000 else (256, 1000)
    # Each layer: 4 * width**2 of attention, 8 * width**2 of the feed-forward part.
    layers = max(1, round((parameters - 2 * width * words) / (12 * width**2)))
    with torch.device("meta"):
        model = _Transformer(layers, width, words).bfloat16()
    mesh = init_device_mesh(device, (1,))
    # Inner modules first: the outer one takes what is left.
    for layer in [*model.layers, model]:
        fully_shard(layer, mesh=mesh)
    model.to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    return model


def _bench(rank: int, folder: Path, device: str, parameters: int, runs: int) -> dict[str, Any]:  # noqa: ARG001
    torch.set_num_threads(os.cpu_count() or 1)
    model = _model(parameters, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    stepping = Stepping(model, optimizer, device)
    # Without moments a save would have nothing of the optimizer to write.
    stepping.run(3)  # the optimizer has its moments then
    export = HFExport(folder / "hf", model=model, when=NEVER, dtype="bfloat16")
    save = ShardedSave(folder / "saves", model=model, optimizer=optimizer, when=NEVER)
    contenders = _contenders(model, optimizer, export, save, folder)
    ways = {}
    for name, body in contenders.items():
        try:
            ways[name] = _measure(body, runs, device, folder)
            print(f"{name}: waits {ways[name]['stall']:.4f} s, in all {ways[name]['seconds']:.2f} s", flush=True)
        except KeyError:  # in the stager of torch 2.11 and 2.12
            if name != ASYNC:
                raise
    # The same steps with and without something beside them, on the same model.
    steps = {
        "alone": stepping.measure(),
        "while an export is written": stepping.measure(export.export, lambda _: export.in_flight > 0),
        "while a save is written": stepping.measure(save.save, lambda step: not save.saving(step).done()),
    }
    export.close()
    save.close()
    ways |= _overlapped(model, optimizer, stepping, steps["alone"]["median"], runs, device, folder)
    nbytes = sum(parameter.numel() for parameter in model.parameters()) * 2
    return {"ways": ways, "ratios": _ratios(ways, steps, nbytes) | _casts(nbytes, device), "steps": steps}


def _overlapped(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    stepping: Stepping,
    step_alone: float,
    runs: int,
    device: str,
    folder: Path,
) -> dict[str, dict[str, float]]:
    """Copies that are made during a step: the wait is what the call and this step take longer than a step alone."""
    export = HFExport(folder / "overlapped_hf", model=model, when=NEVER, dtype="bfloat16", staging="overlap")
    save = ShardedSave(folder / "overlapped_saves", model=model, optimizer=optimizer, when=NEVER, staging="overlap")

    def with_a_step(begin: Callable[[int], None], end: Callable[[int], object]) -> Callable[[int], tuple[float, float]]:
        def body(step: int) -> tuple[float, float]:
            begin(step)
            stepping.run(1)
            # A step alone takes this long; what is more is due to the copies.
            stall = time.perf_counter() - step_alone
            end(step)
            return stall, time.perf_counter() - step_alone

        return body

    bodies = {
        EXPORT_OVERLAP: with_a_step(export.export, lambda _: export.wait()),
        SAVE_OVERLAP: with_a_step(save.save, lambda step: save.saving(step).result()),
    }
    found = {name: _measure(body, runs, device, folder) for name, body in bodies.items()}
    export.close()
    save.close()
    return found


def _contenders(
    model: nn.Module, optimizer: torch.optim.Optimizer, export: HFExport, save: ShardedSave, folder: Path
) -> dict[str, Callable[[int], tuple[float, float]]]:
    """Each does its work as a step of this number, and returns when the training could go on, and when all was done."""
    weights = [value.to_local() for value in model.state_dict().values()]
    moments = [
        value.to_local()
        for held in optimizer.state.values()
        for value in held.values()
        if isinstance(value, Tensor) and hasattr(value, "to_local")
    ]
    bare = {BARE_EXPORT: _bare_copy(weights), BARE_SAVE: _bare_copy([*weights, *moments])}
    pinned = torch.accelerator.is_available()
    stagers = {
        # Pinned memory, shared memory, staging in a thread, non-blocking copies.
        ASYNC: DefaultStager(StagingOptions(pinned, False, False, pinned)),
        ASYNC_BLOCKING: BlockingAsyncStager(cache_staged_state_dict=pinned),  # which pins what it keeps
    }

    def export_it(step: int) -> tuple[float, float]:
        export.export(step)
        stall = time.perf_counter()
        export.wait()
        return stall, time.perf_counter()

    def save_it(step: int) -> tuple[float, float]:
        save.save(step)
        stall = time.perf_counter()
        save.saving(step).result()
        return stall, time.perf_counter()

    def async_save(stager: Any) -> Callable[[int], tuple[float, float]]:
        def save(step: int) -> tuple[float, float]:
            state = {**get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
            written = dcp.async_save(state, checkpoint_id=folder / f"async-{step}", async_stager=stager)
            stall = time.perf_counter()
            # One future, or a response that holds it beside that of the staging.
            (written if hasattr(written, "result") else written.upload_completion).result()
            return stall, time.perf_counter()

        return save

    def consolidated(step: int) -> tuple[float, float]:
        state = get_model_state_dict(model)
        output = str(folder / f"consolidated-{step}")
        writer = HuggingFaceStorageWriter(
            output, dict.fromkeys(state, 1), save_distributed=True, enable_consolidation=True
        )
        dcp.save(state, storage_writer=writer)
        return (time.perf_counter(),) * 2

    def gather(step: int) -> tuple[float, float]:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        torch.save(get_model_state_dict(model, options=options), folder / f"gathered-{step}.pt")
        return (time.perf_counter(),) * 2

    ours = {DISK: _plain_write(folder, sum(value.nbytes for value in weights)), EXPORT: export_it, SAVE: save_it}
    theirs = {name: async_save(stager) for name, stager in stagers.items()}
    return {**bare, **ours, **theirs, CONSOLIDATED: consolidated, GATHER: gather}


def _bare_copy(tensors: list[Tensor]) -> Callable[[int], tuple[float, float]]:
    """The least that a copy of so many bytes can take: one contiguous tensor of the device into one of the host."""
    there = torch.empty(sum(tensor.nbytes for tensor in tensors), dtype=torch.uint8, device=tensors[0].device)
    here = torch.empty(there.shape, dtype=torch.uint8, pin_memory=not there.is_cpu)

    def copy(step: int) -> tuple[float, float]:  # noqa: ARG001
        # Non-blocking and then waited for: as fast as one copy can be.
        here.copy_(there, non_blocking=True)
        _synchronize(there.device.type)
        return (time.perf_counter(),) * 2

    return copy


def _plain_write(folder: Path, nbytes: int) -> Callable[[int], tuple[float, float]]:
    data = memoryview(bytearray(nbytes))

    def write(step: int) -> tuple[float, float]:
        with open(folder / f"plain-{step}", "wb", buffering=0) as file:
            done = 0
            while done < nbytes:
                done += file.write(data[done:])
            os.fsync(file.fileno())
        return (time.perf_counter(),) * 2

    return write


def _measure(body: Callable[[int], tuple[float, float]], runs: int, device: str, folder: Path) -> dict[str, float]:
    stalls, wholes = [], []
    # One more than the runs: the first round makes buffers and is not counted.
    for step in range(1, runs + 2):
        _synchronize(device)
        began = time.perf_counter()
        stall, end = body(step)
        stalls.append(stall - began)
        wholes.append(end - began)
        # Each round finds the disk as the one before did.
        for path in [*folder.glob("*-*"), *folder.glob("*/step-*")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if step > 1 and sum(wholes) > _ENOUGH_SECS:
            break
    return {"stall": statistics.median(stalls[1:]), "seconds": statistics.median(wholes[1:]), "first": wholes[0]}


def _ratios(ways: dict[str, dict[str, float]], steps: dict[str, dict[str, float]], nbytes: int) -> dict[str, str]:
    bare, write, alone = ways[BARE_EXPORT]["stall"], ways[DISK]["seconds"], steps["alone"]["median"]
    found = {
        "bare copy": f"{nbytes / bare / 1e9:.1f} GB/s",
        "export: rate of its copy to that of the bare one (aim 0.9)": f"{bare / ways[EXPORT]['stall']:.2f}",
        "save: the same (aim 0.9)": f"{ways[BARE_SAVE]['stall'] / ways[SAVE]['stall']:.2f}",
        "export with overlap: wait to that of the bare copy": f"{ways[EXPORT_OVERLAP]['stall'] / bare:.2f}",
        "save with overlap: the same": f"{ways[SAVE_OVERLAP]['stall'] / ways[BARE_SAVE]['stall']:.2f}",
        "export: in all to a plain write (aim 1.3)": f"{ways[EXPORT]['seconds'] / write:.2f}",
        "first export: wait, with what pinning takes": f"{ways[EXPORT]['first']:.2f} s in all",
    }
    for name, figures in steps.items():
        if name != "alone":
            found[f"steps {name} (aim 1.02)"] = f"{figures['median'] / alone:.3f} of those alone"
    return found


def _casts(nbytes: int, device: str) -> dict[str, str]:
    """Whether to cast float32 to bfloat16 on the device before the copy, or on the host after it."""
    # As many elements as the weights have, and at most 2**28: the ratio does not change any more.
    count = min(nbytes // 2, 1 << 28)
    there = torch.randn(count, device=device)
    pinned = {"pin_memory": device != "cpu"}
    wide, narrow = (torch.empty(count, dtype=dtype, **pinned) for dtype in (torch.float32, torch.bfloat16))
    out = torch.empty(count, dtype=torch.bfloat16)

    def on_device() -> None:
        narrow.copy_(there.bfloat16(), non_blocking=True)
        _synchronize(device)

    def on_host() -> None:
        wide.copy_(there, non_blocking=True)
        _synchronize(device)
        out.copy_(wide)

    def taken(body: Callable[[], None]) -> float:
        times = []
        for _ in range(4):
            began = time.perf_counter()
            body()
            times.append(time.perf_counter() - began)
        # Without the first, which allocates.
        return statistics.median(times[1:])

    return {
        "cast on the host after the copy to one on the device before it": f"{taken(on_host) / taken(on_device):.2f}x"
    }


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()
