"""The soak for a minute or two; ``make soak`` runs all of it."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.long

# how groups and examples end: tests/ground/test_process_end.py and tests/test_examples.py
SHORT = ["--minutes", "2", "--kills", "6", "--flips", "3", "--only", "kills", "damage"]


def test_a_short_soak_finds_no_fault() -> None:
    ran = subprocess.run([sys.executable, "-m", "tests.soak", *SHORT], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}"
    for part in ("kills", "damage"):
        assert f"| {part} | faults | 0 |" in ran.stdout
