"""The demos are run, as they are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TextIO

import pytest

from shardsmith.ground import object_store
from tests.forked import start_python

ROOT = Path(__file__).parent.parent


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_demo_passes_all_its_checks(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "examples" / "demo.py", "--run", tmp_path / "run", "--steps", "60"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "15 of 15 checks passed" in found.stdout
    exports = {path.name for path in (tmp_path / "run" / "hf").iterdir()}
    assert exports - {".retention.json"} == {"step-60", "step-60-ema"}


def test_the_demo_in_an_object_store_starts_as_a_script() -> None:
    command = [sys.executable, ROOT / "examples" / "demo_remote.py", "--help"]
    assert "--steps" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


class ForkedScript:
    """What the demos use of ``Popen``. That the script starts in a new interpreter is for the demo above."""

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str], stdout: int | None, text: bool) -> None:
        assert text
        output = Path(command[command.index("--directory") + 1]).with_name("output")
        if stdout is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.unlink(missing_ok=True)
            os.mkfifo(output)
        self._process = start_python(*command[1:], env=env, output=None if stdout is None else output)
        self.stdout: TextIO | None = None if stdout is None else output.open()

    def send_signal(self, which: signal.Signals) -> None:
        assert which == signal.SIGKILL
        self._process.kill()

    def wait(self) -> int | None:
        self._process.join()
        return self._process.exitcode


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")
def test_the_demo_in_an_object_store_passes_all_its_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.setattr(object_store, "_clients", {})
    import demo
    import demo_remote

    monkeypatch.setattr(demo, "subprocess", SimpleNamespace(Popen=ForkedScript, PIPE=subprocess.PIPE))
    monkeypatch.setattr(sys, "argv", ["demo_remote.py", "--run", str(tmp_path / "run"), "--steps", "60"])
    code = demo_remote.main()
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert "6 of 6 checks passed" in printed
