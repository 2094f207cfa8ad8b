"""A model like BAGEL with its average, from a sharded checkpoint to a complete directory: one process, four, and the
way that gathers a full state dict.

Times are of whole processes, imports included; memory is anonymous memory, summed over all processes.
"""

from __future__ import annotations

import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.measure import Measurement, measure

OURS = "shardsmith to-hf"
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node=4", "--master_port=29671")
CONTENDERS = {
    OURS: ("-m", "shardsmith.cli", "to-hf", "--quiet"),
    f"{OURS}, 4 processes": (*TORCHRUN, "-m", "shardsmith.cli", "to-hf", "--quiet"),
    "dcp.load + full state dict on rank 0, 4 processes": (*TORCHRUN, "-m", "benchmarks.bagel_contender", "gather"),
}


def compare_bagel(console: Console, work: Path, parameters: int, runs: int) -> dict[str, Any]:
    """Save a checkpoint of main weights and average, convert it in each way in turn, print the table; the figures."""
    checkpoint, base, output = work / "bagel", work / "bagel-base", work / "bagel-output"
    console.print(f"saving a model like BAGEL, {parameters / 1e6:.0f} M float32 parameters and its average, in {work}")
    places = ["--checkpoint_dir", checkpoint, "--output_dir", output, "--base_model_path", base]
    arguments = [str(place) for place in places]
    make = (*TORCHRUN, "-m", "benchmarks.bagel_contender", "make", "--parameters", str(parameters))
    measure([sys.executable, *make, *arguments])
    results: dict[str, list[Measurement]] = {name: [] for name in CONTENDERS}
    for turn in range(runs):
        for name, command in CONTENDERS.items():
            results[name].append(measure([sys.executable, *command, *arguments]))
            console.print(f"run {turn + 1}: {name}: {results[name][-1].seconds:.2f} s")
            shutil.rmtree(output)
    console.print(_table(results))
    shutil.rmtree(checkpoint)
    return {name: [vars(measurement) for measurement in found] for name, found in results.items()}


def _table(results: dict[str, list[Measurement]]) -> Table:
    table = Table("tool", "seconds", "times ours", "peak memory", title="main and average, bfloat16")
    seconds = {name: statistics.median(m.seconds for m in found) for name, found in results.items()}
    for name, found in results.items():
        memory = statistics.median(m.peak_bytes for m in found)
        table.add_row(name, f"{seconds[name]:.2f}", f"{seconds[name] / seconds[OURS]:.1f}x", f"{memory / 1e6:.0f} MB")
    return table
