"""A document that a reader follows: its program is run, then its commands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

from tests.forked import run_python


def follow(document: Path, folder: Path, python: str | Path) -> None:
    """Run what a document says in a folder, and compare what comes of it with what the document shows.

    Args:
        document: The README or the tutorial.
        folder: An empty one.
        python: Of an environment that has the package. Commands of this one are forked.
    """
    text = document.read_text()
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (folder / "train.py").write_text(program)
    ran = subprocess.run([python, "train.py"], cwd=folder, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    shown = re.findall(r"^(?:saved|exported) run/.*$", text, re.MULTILINE)
    assert not shown or _without_times(ran.stderr.splitlines()) == _without_times(shown)
    assert sorted(os.listdir(folder / "run/checkpoints")) == [".retention.json", "step-20", "step-25"]
    averages = load_file(folder / "run/hf/step-25/ema.safetensors")
    assert sorted(averages) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    commands = re.findall(r"^shardsmith ((?:inspect|verify) run\b.*)$", text, re.MULTILINE)
    for command in commands:
        arguments = ["-m", "shardsmith", *command.split()]
        if python == sys.executable:
            done = run_python(*arguments, cwd=folder)
        else:
            done = subprocess.run([python, *arguments], cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    if any("--html report.html" in command for command in commands):
        report = (folder / "report.html").read_text()
        assert "Seconds that the training waited for each save" in report
        assert report.count("<circle") >= 2 * 3  # of three saves: sizes of those that are kept, seconds of all


def _without_times(lines: list[str]) -> list[str]:
    return sorted(re.sub(r": .* in [0-9.]+ s, of which .*", "", line) for line in lines)
