"""A model like BAGEL with its average, from a sharded checkpoint to a complete directory: ``to-hf`` in one process, in
two and in as many as there are shards, and the way that gathers a full state dict.

The checkpoint is laid out as the sharded fork of BAGEL does it: one DCP directory a model. Each way runs alone, finds
the checkpoint outside the page cache, and its output is removed before the next begins. Times are of whole processes,
imports included; memory is anonymous memory, summed over all processes.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.bagel_contender import make
from benchmarks.measure import Measurement, measure
from benchmarks.rank_processes import spawn_ranks
from benchmarks.room import forget_cached, is_in_memory, why_not

OURS = "shardsmith to-hf"
ONE_CORE = f"{OURS}, on one core"
_PROCESS_BYTES = 650e6
"""What a process holds that has imported torch, FSDP and the model, and some tensors on their way."""


def torchrun(processes: int) -> tuple[str, ...]:
    """How to start so many."""
    return (sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_port=29671")


TO_HF = ("-m", "shardsmith.cli", "to-hf", "--quiet")


def gather(ranks: int) -> str:
    """Name of the way that gathers."""
    return f"dcp.load + full state dict on rank 0, {ranks} processes"


def contenders(ranks: int) -> dict[str, tuple[str, ...]]:
    """All that are compared."""
    return {
        # taskset limits the process to one core; threads that it starts share that.
        ONE_CORE: ("taskset", "--cpu-list", "0", sys.executable, *TO_HF),
        OURS: (sys.executable, *TO_HF),
        **{f"{OURS}, {several} processes": (*torchrun(several), *TO_HF) for several in (2, ranks)},
        gather(ranks): (*torchrun(ranks), "-m", "benchmarks.bagel_contender"),
    }


def disk_needed(parameters: int) -> float:
    """Bytes: main weights and average in float32, and one output in bfloat16."""
    # Two models of 4 bytes an element, and 2 bytes of each in the output.
    return parameters * 2 * (4 + 2)


def memory_needed(parameters: int, ranks: int) -> float:
    """Bytes: one model at a time is made, sharded over all ranks; everything of ours takes less."""
    # Sharded over the ranks, so it is one model altogether.
    return parameters * 4 + ranks * _PROCESS_BYTES


def memory_to_gather(parameters: int, ranks: int) -> float:
    """Bytes: its shards, all of it once more on rank 0, and on every rank the tensor that is being gathered."""
    # 4 bytes of the shards, 4 of the gathered model, 2 of the cast one.
    return parameters * 10 + ranks * _PROCESS_BYTES


def compare_bagel(console: Console, work: Path, parameters: int, ranks: int, runs: int) -> dict[str, Any]:
    """Save a checkpoint of main weights and average, convert it in each way in turn, print the table; the figures."""
    checkpoint, base, output = work / "bagel", work / "bagel-base", work / "bagel-output"
    console.print(f"saving a model like BAGEL, {parameters / 1e6:.0f} M float32 parameters and its average, in {work}")
    places = ["--checkpoint_dir", checkpoint, "--output_dir", output, "--base_model_path", base]
    arguments = [str(place) for place in places]
    spawn_ranks(make, ranks, work / "bagel-ranks", checkpoint, base, parameters)
    ways = contenders(ranks)
    results: dict[str, list[Measurement]] = {name: [] for name in ways}
    for turn in range(runs):
        for name, command in ways.items():
            # A third of the space is the output; two thirds are the checkpoint, which is there.
            room = (disk_needed(parameters) / 3, memory_to_gather(parameters, ranks))
            if name == gather(ranks) and (lack := why_not(work, *room)):
                console.print(f"run {turn + 1}: {name}: not run, {lack}")
                continue
            # The one that ran before has left the files in the page cache.
            forget_cached(checkpoint)
            results[name].append(measure([*command, *arguments]))
            console.print(f"run {turn + 1}: {name}: {results[name][-1].seconds:.2f} s")
            shutil.rmtree(output)
    shutil.rmtree(checkpoint)
    medium = "tmpfs" if is_in_memory(work) else "disk, not in the page cache"
    console.print(_table(results, f"{parameters * 8 / 1e9:.1f} GB in, on {medium}; {os.cpu_count()} cores"))
    console.print(_ratios(results))
    return {name: [vars(measurement) for measurement in found] for name, found in results.items()}


def _table(results: dict[str, list[Measurement]], title: str) -> Table:
    table = Table("main and average, bfloat16", "seconds", "times ours", "peak memory", title=title)
    ours = _seconds(results[OURS])
    for name, found in results.items():
        if found:
            memory = statistics.median(m.peak_bytes for m in found)
            table.add_row(name, f"{_seconds(found):.2f}", f"{_seconds(found) / ours:.1f}x", f"{memory / 1e6:.0f} MB")
        else:
            table.add_row(name, "not run", "", "")
    return table


def _ratios(results: dict[str, list[Measurement]]) -> str:
    """One process has a thread for each of up to 8 cores: several gain something only where that leaves cores idle."""
    ways = {"one process": OURS, **{name.removeprefix(f"{OURS}, "): name for name in results if f"{OURS}," in name}}
    ours = _seconds(results[OURS])
    found = (f"{words} {_seconds(results[name]) / ours:.2f}" for words, name in ways.items())
    return f"times against one process on {os.cpu_count()} cores: {', '.join(found)}"


def _seconds(found: list[Measurement]) -> float:
    return statistics.median(m.seconds for m in found)
