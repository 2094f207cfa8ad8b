"""From a Hugging Face directory to a checkpoint to start from: ``to-dcp``, a plain copy, and what people use instead.

Each runs as a process of its own, several times, in turn with the others. Times are of the whole process, imports
included; the median is shown. Memory is the peak of anonymous memory, summed over all processes. Ours writes while it
imports what makes the model, so it is held against that import, too; and against a copy that is on disk when it ends.
"""

from __future__ import annotations

import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.initial_contender import make
from benchmarks.measure import Measurement, measure
from benchmarks.rank_processes import spawn_ranks

OURS = "shardsmith to-dcp"
COPY = "cp -r, the limit"
DURABLE_COPY = "cp -r and fsync"
IMPORTS = "importing the model's class, the limit"


@dataclass(frozen=True)
class Way:
    """A command that makes OUTPUT out of MODEL."""

    name: str
    command: tuple[str, ...]


def ways(ranks: int) -> tuple[Way, ...]:
    """All that are compared."""
    ours = ("-m", "shardsmith.cli", "to-dcp", "--model", "MODEL", "--checkpoint", "OUTPUT", "--quiet")
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}")
    return (
        Way(OURS, (sys.executable, *ours)),
        Way(f"{OURS}, {ranks} ranks", (sys.executable, *torchrun, *ours)),
        Way("from_pretrained + dcp.save", (sys.executable, "-m", "benchmarks.initial_contender", "MODEL", "OUTPUT")),
        Way(COPY, ("cp", "-r", "MODEL", "OUTPUT")),
        Way(DURABLE_COPY, ("sh", "-c", 'cp -r "$0" "$1" && sync "$1"/* "$1"', "MODEL", "OUTPUT")),
        Way("one pass with a hash, no fsync", (sys.executable, "-m", "benchmarks.one_pass", "MODEL", "OUTPUT")),
        Way(IMPORTS, (sys.executable, "-c", "from transformers import LlamaForCausalLM")),
    )


def compare_initial(console: Console, work: Path, parameters: int, ranks: int, runs: int) -> dict[str, Any]:
    """Make a model directory, convert it in each way in turn, print the table; the figures."""
    model = _make(console, work / "model", parameters)
    nbytes = _size(model)
    results = _run_all(console, ways(ranks), model, runs)
    shutil.rmtree(model)
    console.print(_table(results, nbytes))
    # Memory was summed over all ranks.
    per_rank = _median(results[f"{OURS}, {ranks} ranks"], "peak_bytes") / ranks
    # The aim: a fifth more than the shard, and what an interpreter with torch takes.
    bound = 1.2 * nbytes / ranks + 300e6
    against = {name: _median(results[OURS], "seconds") / _median(found, "seconds") for name, found in results.items()}
    console.print(
        f"anonymous memory of a rank: {per_rank / 1e6:.0f} MB; the aim is at most 1.2 x its shard + 300 MB = "
        f"{bound / 1e6:.0f} MB. Time against a copy: {against[COPY]:.1f}x, the aim is at most 2x; against one that is "
        f"on disk when it ends, as ours is: {against[DURABLE_COPY]:.1f}x; against the import: {against[IMPORTS]:.1f}x"
    )
    return {name: [vars(measurement) for measurement in found] for name, found in results.items()}


def _make(console: Console, model: Path, parameters: int) -> Path:
    console.print(f"saving a bfloat16 Llama of about {parameters / 1e6:.0f} M parameters in {model}")
    spawn_ranks(make, 1, model.with_name("initial"), model, parameters)
    return model


def _size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.iterdir())


def _run_all(console: Console, chosen: Sequence[Way], model: Path, runs: int) -> dict[str, list[Measurement]]:
    """Each way in turn, ``runs`` times round, so that a slow moment of the machine hits all alike."""
    places = {"MODEL": str(model), "OUTPUT": str(model.with_name("output"))}
    results: dict[str, list[Measurement]] = {way.name: [] for way in chosen}
    for turn in range(runs):
        for way in chosen:
            # The words MODEL and OUTPUT of a command stand for the places.
            found = measure([places.get(word, word) for word in way.command])
            results[way.name].append(found)
            console.print(f"run {turn + 1}: {way.name}: {found.seconds:.2f} s", highlight=False)
            shutil.rmtree(places["OUTPUT"], ignore_errors=True)
    return results


def _table(results: dict[str, list[Measurement]], nbytes: int) -> Table:
    table = Table("way", "seconds", "times ours", "CPU seconds", "peak memory", title=f"{nbytes / 1e9:.2f} GB in")
    ours = _median(results[OURS], "seconds")
    for name, found in results.items():
        seconds, memory = _median(found, "seconds"), _median(found, "peak_bytes")
        cpu = _median(found, "cpu_seconds")
        table.add_row(name, f"{seconds:.2f}", f"{seconds / ours:.1f}x", f"{cpu:.1f}", f"{memory / 1e6:.0f} MB")
    return table


def _median(found: list[Measurement], what: str) -> float:
    return statistics.median(getattr(measurement, what) for measurement in found)
