"""``python -m benchmarks``: us and what people use instead, side by side in one run on one machine."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console

from benchmarks.bagel import compare_bagel, disk_needed, memory_needed
from benchmarks.device import measure_device
from benchmarks.diagnosis import measure_diagnosis
from benchmarks.events import measure_events
from benchmarks.initial import compare_initial
from benchmarks.live import compare_live
from benchmarks.offline import compare_offline
from benchmarks.one_write import compare_one_write
from benchmarks.room import why_not, working_directory
from benchmarks.save import compare_saves, room_needed
from benchmarks.titan import compare_titan
from shardsmith.ground.sizes import parse_size


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the benchmark, and what it needs at its peak."""

    run: Callable[[Path], dict[str, Any]]
    disk_bytes: float
    memory_bytes: float


Name = Literal[
    "save", "remote", "one-write", "offline", "live", "initial", "diagnose", "events", "bagel", "titan", "device"
]


def main(
    parameters: str = "700M",
    shards: int = 4,
    runs: int = 3,
    only: Literal["all"] | Name = "all",
    bagel_parameters: str | None = None,
    device: str | None = None,
    small_tensors: int | None = None,
    timeline: Path | None = None,
    directory: Path | None = None,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Compare ways to save a run and to resume it, to a Hugging Face directory, and from one.

    save: a run on sharded ranks, a quarter of the size, with optimizer and average; and its resume.
    remote: the same run, saved to an S3 server of this machine.
    one-write: the same run, with weights that others load, too: a save with an export beside it, and one write.
    titan: TorchTitan's own saves and those with engine, where its environment of the tests is there.
    offline: from a sharded checkpoint. live: from live sharded weights. initial: to a checkpoint to start from.
    device: one rank that trains on a GPU; part of all where there is one.
    diagnose: what a diagnosis costs. events: what hooks cost in a step at which they do nothing.
    bagel: a model like BAGEL with its average, in one process, in two and in as many as there are shards.

    Needs at the default sizes, at the peak of each section: save 3 GB of disk and 20 GB of memory, one-write 5 and
    17, offline 8 and 8,
    live 3 and 11, initial 5 and 4, diagnose 3 and 1, bagel 17 and 17: all of it fits a machine with 24 GB of memory
    and 40 GB of disk.
    On tmpfs the disk is memory, too. A section for which there is no room is not run, and that is said; of bagel only
    the full state dict needs more than 9 GB of memory, and is left out alone.

    Args:
        parameters: Size of the float32 Llama, such as 700M.
        shards: Number of ranks that hold it.
        small_tensors: In the section save, so many parameters of 1,000 elements instead of the Llama, such as 2500.
        timeline: Where to draw one save of the section save, as SVG.
        runs: Runs of each tool.
        only: Name of the one section to run.
        bagel_parameters: Size of the model like BAGEL; default twice the Llama, which is a tenth of BAGEL.
        device: Where the model of the section device trains, such as cuda; default the accelerator that there is.
        directory: Where to work; default the system's temporary directory, or /var/tmp where that one is in memory.
        json_file: Also write the figures there.
    """
    console = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else 140)
    figures: dict[str, Any] = {}
    size = parse_size(parameters)
    bagel = parse_size(bagel_parameters) if bagel_parameters else 2 * size
    # Values are compared tensor by tensor: beyond a GB the rate stays the same.
    compared = min(4 * size, 1 << 30)
    # Bytes by the number of parameters: a state in float32 with AdamW and an average takes 16 for each.
    sections: dict[Name, Section] = {
        "save": Section(
            lambda work: compare_saves(
                console, work, size // 4, shards, runs, small_tensors=small_tensors, timeline=timeline
            ),
            *room_needed(size // 4, shards),
        ),
        "remote": Section(lambda work: _remote(console, work, size // 4, shards, runs), 40 * size // 4, 60 * size // 4),
        "one-write": Section(
            lambda work: compare_one_write(console, work, size // 4, shards, runs), 26 * size // 4, 90 * size // 4
        ),
        "offline": Section(lambda work: compare_offline(console, work, size, shards, runs), 11 * size, 11 * size),
        "live": Section(lambda work: compare_live(console, work, size, shards, runs), 4 * size, 15 * size),
        "initial": Section(lambda work: compare_initial(console, work, size, shards, runs), 6 * size, 5 * size),
        "diagnose": Section(lambda work: measure_diagnosis(console, work, compared, runs), 3 * compared, 1e9),
        "events": Section(lambda work: measure_events(console, work, runs), 1e6, 1e9),
        "titan": Section(lambda work: compare_titan(console, work, size // 4, shards, runs), 4 * size, 60 * size // 4),
        "bagel": Section(
            lambda work: compare_bagel(console, work, bagel, shards, runs),
            disk_needed(bagel),
            memory_needed(bagel, shards),
        ),
    }
    here = torch.accelerator.current_accelerator(check_available=True)
    # "cpu" only where it is asked for: it shows that the section works, and no figure of a device.
    if kind := device or (here.type if here else "cpu" if only == "device" else None):
        sections["device"] = Section(lambda work: measure_device(console, work, kind, size, runs), 30 * size, 30 * size)
    if directory:
        directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="shardsmith-bench-", dir=directory or working_directory()) as work:
        for name, section in sections.items():
            if only not in ("all", name):
                continue
            # Before each section: the ones before it have given back what they took.
            lack = why_not(Path(work), section.disk_bytes, section.memory_bytes)
            if lack:
                console.print(f"{name}: not run, {lack}")
            figures[name] = {"not run": lack} if lack else section.run(Path(work))
    if json_file:
        json_file.write_text(json.dumps(figures, indent=1))


def _remote(*arguments: Any) -> dict[str, Any]:
    """Imported when it runs: a machine that measures something else may lack the client and the server of its store."""
    from benchmarks.remote import compare_remote

    return compare_remote(*arguments)


if __name__ == "__main__":
    tyro.cli(main)
