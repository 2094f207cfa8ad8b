"""From a sharded checkpoint to a Hugging Face directory: ``to-hf`` and what people use instead.

Each tool runs as a process of its own, several times, in turn with the others. Times are of the whole process, imports
included; the median is shown. Memory is the peak of the process's anonymous memory (mapped files do not count, the
kernel can drop those), summed over its children.
"""

from __future__ import annotations

import shutil
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.checkpoint import save_llama
from benchmarks.measure import Measurement, measure
from benchmarks.rank_processes import spawn_ranks

OURS = "shardsmith to-hf"


@dataclass(frozen=True)
class Contender:
    """A way from a sharded checkpoint to weights that ``from_pretrained`` loads."""

    name: str
    output_dtype: str
    command: tuple[str, ...]


CONTENDERS = (
    Contender(OURS, "bfloat16", ("-m", "shardsmith.cli", "to-hf", "--quiet")),
    Contender("accelerate merge_fsdp_weights", "float32", ("-m", "benchmarks.offline_contenders", "accelerate")),
    Contender(
        "dcp.load + HuggingFaceStorageWriter, consolidated",
        "bfloat16",
        ("-m", "benchmarks.offline_contenders", "consolidate"),
    ),
    Contender("dcp_to_torch_save + save_pretrained", "bfloat16", ("-m", "benchmarks.offline_contenders", "torch-save")),
)


def compare_offline(console: Console, work: Path, parameters: int, shards: int, runs: int) -> dict[str, Any]:
    """Save a checkpoint, convert it with each tool in turn, print the table; the figures."""
    checkpoint, base = work / "checkpoint", work / "base"
    console.print(f"saving a Llama of about {parameters / 1e6:.0f} M float32 parameters from {shards} ranks in {work}")
    largest = spawn_ranks(save_llama, shards, work / "offline", checkpoint, base, parameters)["largest_tensor"]
    nbytes = sum(file.stat().st_size for file in checkpoint.iterdir())
    results = _run_all(console, runs, checkpoint, base, work / "output")
    shutil.rmtree(checkpoint)
    console.print(_table(results, nbytes))
    # The aim: what an interpreter with torch takes, and room for two copies of the largest tensor.
    peak, bound = _median(results[OURS], "peak_bytes"), 400e6 + 2 * largest
    console.print(
        f"anonymous memory of {OURS}: {peak / 1e6:.0f} MB; the aim is at most 400 MB + 2 x the largest tensor "
        f"({largest / 1e6:.0f} MB) = {bound / 1e6:.0f} MB"
    )
    return {name: [vars(measurement) for measurement in found] for name, found in results.items()}


def _run_all(console: Console, runs: int, checkpoint: Path, base: Path, output: Path) -> dict[str, list[Measurement]]:
    """Each contender in turn, ``runs`` times round, so that a slow moment of the machine hits all alike."""
    results: dict[str, list[Measurement]] = {contender.name: [] for contender in CONTENDERS}
    for turn in range(runs):
        for contender in CONTENDERS:
            arguments = ("--checkpoint_dir", checkpoint, "--output_dir", output, "--base_model_path", base)
            found = measure([sys.executable, *contender.command, *map(str, arguments)])
            results[contender.name].append(found)
            console.print(f"run {turn + 1}: {contender.name}: {found.seconds:.2f} s", highlight=False)
            shutil.rmtree(output)
    return results


def _table(results: dict[str, list[Measurement]], nbytes: int) -> Table:
    table = Table(
        "tool", "writes", "seconds", "times ours", "peak memory", "times ours", title=f"{nbytes / 1e9:.2f} GB in"
    )
    seconds, memory = _median(results[OURS], "seconds"), _median(results[OURS], "peak_bytes")
    for contender in CONTENDERS:
        found = results[contender.name]
        table.add_row(
            contender.name,
            contender.output_dtype,
            f"{_median(found, 'seconds'):.2f}",
            f"{_median(found, 'seconds') / seconds:.1f}x",
            f"{_median(found, 'peak_bytes') / 1e6:.0f} MB",
            f"{_median(found, 'peak_bytes') / memory:.1f}x",
        )
    return table


def _median(found: list[Measurement], what: str) -> float:
    return statistics.median(getattr(measurement, what) for measurement in found)
