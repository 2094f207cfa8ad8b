"""More real ranks and tensors than elsewhere: what ``make bench-ranks`` does, on a smaller scale."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RANKS, TENSORS = 16, 1_500


@pytest.mark.long
def test_sixteen_ranks_save_export_stop_together_and_resume_bit_for_bit(tmp_path: Path) -> None:
    """Each rank compares what it resumes; then torch and safetensors read the step and the export."""
    command = [sys.executable, "-m", "benchmarks.many_ranks", "--ranks", f"{RANKS}", "--tensors", f"{TENSORS}"]
    done = subprocess.run([*command, "--directory", str(tmp_path)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"{RANKS} ranks, {TENSORS:,} tensors, stopped together after step" in done.stdout
    assert not [*tmp_path.iterdir()]
