"""From a Hugging Face directory to a checkpoint to start from: ``to-dcp``, a plain copy, and what people use instead.

Each runs as a process of its own, several times, in turn with the others. Times are of the whole process, imports
included; the median is shown. Memory is the peak of anonymous memory, summed over all processes.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.measure import Measurement, measure

OURS = "shardsmith to-dcp"
COPY = "cp -r, the limit"


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
    )


def compare_initial(console: Console, work: Path, parameters: int, ranks: int, runs: int) -> dict[str, Any]:
    """Make a model directory, convert it in each way in turn, print the table; the figures."""
    model, output = work / "model", work / "output"
    console.print(f"saving a bfloat16 Llama of about {parameters / 1e6:.0f} M parameters in {work}")
    make = [sys.executable, "-m", "benchmarks.initial_contender", "--make", str(model), str(parameters)]
    subprocess.run(make, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    nbytes = sum(file.stat().st_size for file in model.iterdir())
    results: dict[str, list[Measurement]] = {way.name: [] for way in ways(ranks)}
    for turn in range(runs):
        for way in ways(ranks):
            places = {"MODEL": str(model), "OUTPUT": str(output)}
            found = measure([places.get(word, word) for word in way.command])
            results[way.name].append(found)
            console.print(f"run {turn + 1}: {way.name}: {found.seconds:.2f} s", highlight=False)
            shutil.rmtree(output)
    shutil.rmtree(model)
    console.print(_table(results, nbytes))
    per_rank = _median(results[f"{OURS}, {ranks} ranks"], "peak_bytes") / ranks
    bound = 1.2 * nbytes / ranks + 300e6
    against_copy = _median(results[OURS], "seconds") / _median(results[COPY], "seconds")
    console.print(
        f"anonymous memory of a rank: {per_rank / 1e6:.0f} MB; the aim is at most 1.2 x its shard + 300 MB = "
        f"{bound / 1e6:.0f} MB. Time against a copy: {against_copy:.1f}x; the aim is at most 2x"
    )
    return {name: [vars(measurement) for measurement in found] for name, found in results.items()}


def _table(results: dict[str, list[Measurement]], nbytes: int) -> Table:
    table = Table("way", "seconds", "times ours", "peak memory", title=f"{nbytes / 1e9:.2f} GB in")
    ours = _median(results[OURS], "seconds")
    for name, found in results.items():
        seconds, memory = _median(found, "seconds"), _median(found, "peak_bytes")
        table.add_row(name, f"{seconds:.2f}", f"{seconds / ours:.1f}x", f"{memory / 1e6:.0f} MB")
    return table


def _median(found: list[Measurement], what: str) -> float:
    return statistics.median(getattr(measurement, what) for measurement in found)
