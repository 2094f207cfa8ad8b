"""The examples are run, as they are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forked import run_torchrun

ROOT = Path(__file__).parent.parent


@pytest.mark.long
def test_a_wrong_start_is_diagnosed_converted_and_proved(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "examples" / "initial_load.py", "--run", tmp_path / "run", "--steps", "150"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stdout.count("│ ok │") == 8
    assert "The weights are fine" in found.stdout


@pytest.fixture(scope="session")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for several examples, which need the same text and tokenizer."""
    return tmp_path_factory.mktemp("example")


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("example", "exports"),
    [
        ("transformers_trainer.py", {"out-hf/step-12", "out-hf/step-12-ema"}),
        ("accelerate_loop.py", {"hf/step-12"}),
    ],
)
def test_an_example_goes_on_where_it_was_stopped(run_directory: Path, example: str, exports: set[str]) -> None:
    script = [ROOT / "examples" / example, "--directory", run_directory, "--steps"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    first = subprocess.run([*torchrun, *script, "10"], capture_output=True, text=True, cwd=run_directory)
    for found in (first, run_torchrun(2, *script, "12", cwd=run_directory)):
        assert found.returncode == 0, found.stdout + found.stderr
        assert "evaluation loss: main" in found.stdout
    assert all((run_directory / name / "tokenizer.json").is_file() for name in exports)


_RUN_NOTEBOOK = """
import nbclient, nbformat, sys
notebook = nbformat.read(sys.argv[1], 4)
nbclient.NotebookClient(notebook, timeout=200).execute()
nbformat.write(notebook, "ran.ipynb")
"""


@pytest.mark.long
def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _RUN_NOTEBOOK, str(ROOT / "examples" / "notebook.ipynb")]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # where the command shardsmith is
    ran = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    cells = json.loads((tmp_path / "ran.ipynb").read_text())["cells"]
    printed = ["".join("".join(out.get("text", [])) for out in cell.get("outputs", [])) for cell in cells]
    assert any("average" in text and "live weights" in text for text in printed)
    assert any("200 export hf/step-200" in text and text.count("sound") == 5 for text in printed)
    assert any("the same model, in every value" in text for text in printed)
    assert "Seconds that the training waited" in (tmp_path / "run.html").read_text()
