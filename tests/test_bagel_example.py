"""The commands of examples/bagel/README.md, as they stand there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.forked import run_torchrun

ROOT = Path(__file__).parent.parent
README = (ROOT / "examples" / "bagel" / "README.md").read_text()


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


@pytest.mark.long
@pytest.mark.timeout(600)
def test_every_command_works(tmp_path: Path) -> None:
    for folder in ("examples", "shardsmith"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    bin_folder = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{bin_folder}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    printed: list[str] = []
    for command in commands():
        if "-m shardsmith to-hf" in command and len(printed) > 1:  # the first one shows that torchrun can start it
            ranks, *words = shlex.split(command)[1:]
            arguments = words[words.index("-m") :]
            ran = run_torchrun(int(ranks.removeprefix("--nproc_per_node=")), *arguments, cwd=tmp_path)
        else:
            ran = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, f"{command}\n{ran.stdout}\n{ran.stderr}"
        printed.append(ran.stdout)
    assert len(printed) == 5
    assert printed[1].count("wrote bagel-run/hf-6") == 1  # rank 0 speaks for all four
    assert "none on meta" in printed[-1]
    run = tmp_path / "bagel-run"
    assert {path.name for path in run.iterdir()} == {"checkpoints", "hf-6", "hf-6-ema", "hf-6-main"}
    for name, part in (("ema", "hf-6-ema"), ("model", "hf-6-main")):
        one, other = (run / folder / f"{name}.safetensors" for folder in ("hf-6", part))
        assert one.read_bytes() == other.read_bytes()
    assert len(load_file(run / "hf-6" / "model.safetensors")) == 111
