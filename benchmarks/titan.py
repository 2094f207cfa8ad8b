"""Saves of a TorchTitan run with and without the option ``engine``, in the environment that has TorchTitan."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

PYTHON = Path(__file__).parents[1] / ".venv-titan-0.3" / "bin" / "python"


def compare_titan(console: Console, work: Path, parameters: int, ranks: int, runs: int) -> dict[str, Any]:
    """Save by TorchTitan's own manager and with ``engine`` in turn, print the table; the figures.

    Args:
        console: Where to print.
        work: A directory for all that is saved.
        parameters: Size of the float32 Llama, which has AdamW and no average.
        ranks: Number of ranks that hold it.
        runs: Rounds that count; one before them makes the memory.
    """
    if not PYTHON.is_file():
        console.print(f"titan: not run, there is no {PYTHON} (make {PYTHON.parents[1].name}/.ready)")
        return {"not run": "no TorchTitan"}
    console.print(f"TorchTitan's saves of a Llama of about {parameters / 1e6:.0f} M parameters on {ranks} ranks")
    result = work / "titan.json"
    given = [*map(str, (parameters, ranks, runs, work, result))]
    # In the environment that has TorchTitan, whose versions of torch are others than here.
    subprocess.run([PYTHON, "-m", "benchmarks.titan_saves", *given], check=True)
    found: dict[str, Any] = json.loads(result.read_text())
    table = Table("TorchTitan's step", "seconds", "training waits", "processor seconds", "extra memory of a rank")
    for name, figures in found.items():
        table.add_row(
            name,
            f"{figures['seconds']:.2f}",
            f"{figures['stall']:.2f}",
            f"{figures['cpu_seconds']:.1f}",
            f"{figures['extra_bytes'] / 1e6:.0f} MB",
        )
    console.print(table)
    return found
