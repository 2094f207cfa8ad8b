"""``python -m benchmarks``: us and what people use instead, side by side in one run on one machine."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from benchmarks.bagel import compare_bagel
from benchmarks.diagnosis import measure_diagnosis
from benchmarks.initial import compare_initial
from benchmarks.live import compare_live
from benchmarks.offline import compare_offline
from shardsmith.safetensors_files.plan import parse_size


def main(
    parameters: str = "700M",
    shards: int = 4,
    runs: int = 3,
    only: Literal["all", "offline", "live", "initial", "diagnose", "bagel"] = "all",
    bagel_parameters: str | None = None,
    directory: Path | None = None,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Compare ways to a Hugging Face directory, and from one.

    offline: from a sharded checkpoint. live: from live sharded weights. initial: to a checkpoint to start from.
    diagnose: what a diagnosis costs. bagel: a model like BAGEL with its average, in one process and in four.

    Args:
        parameters: Size of the float32 Llama, such as 700M.
        bagel_parameters: Size of the model like BAGEL; default twice the Llama, which is a tenth of BAGEL.
        shards: Number of ranks that hold it.
        runs: Runs of each tool.
        directory: Where to work; default the system's temporary directory. Needs about 5 times the model.
        json_file: Also write the figures there.
    """
    console = Console(soft_wrap=True, highlight=False)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="shardsmith-bench-", dir=directory) as work:
        size = parse_size(parameters)
        if only in ("all", "offline"):
            figures["offline"] = compare_offline(console, Path(work), size, shards, runs)
        if only in ("all", "live"):
            figures["live"] = compare_live(console, Path(work), size, shards, runs)
        if only in ("all", "initial"):
            figures["initial"] = compare_initial(console, Path(work), size, shards, runs)
        if only in ("all", "diagnose"):
            figures["diagnose"] = measure_diagnosis(console, Path(work), min(4 * size, 1 << 30), runs)
        if only in ("all", "bagel"):
            figures["bagel"] = compare_bagel(
                console, Path(work), parse_size(bagel_parameters) if bagel_parameters else 2 * size, runs
            )
    if json_file:
        json_file.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    tyro.cli(main)
