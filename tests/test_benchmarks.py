"""The benchmark is run, small: every tool of it does its work once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as benchmark
from benchmarks import bagel, initial, offline
from benchmarks import measure as measuring
from benchmarks.measure import Measurement, measure
from tests.forked import run_python, run_torchrun, server

ROOT = Path(__file__).parent.parent


def measure_forked(command: Sequence[str]) -> Measurement:
    """Tools of others run as the benchmark runs them; commands of ours, of which other tests start each, are forked."""
    if "shardsmith.cli" not in command:
        return measure(command)
    began, words = time.perf_counter(), list(command[command.index(sys.executable) + 1 :])
    if command[0] == "taskset":
        done = run_python(*words, before=partial(os.sched_setaffinity, 0, {0}))
    elif words[1] == "torch.distributed.run":
        (ranks,) = (word.partition("=")[2] for word in words if word.startswith("--nproc_per_node="))
        done = run_torchrun(int(ranks), *words[words.index("shardsmith.cli") - 1 :])
    else:
        done = run_python(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    return Measurement(time.perf_counter() - began, 1, 1.0)


def test_it_starts_as_a_program() -> None:
    command = [sys.executable, "-m", "benchmarks", "--help"]
    assert "--bagel-parameters" in subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")
def test_the_benchmark_runs_every_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server()  # before the benchmark starts one of its own, which ranks of later tests would be forked from
    monkeypatch.chdir(ROOT)
    # Reading the memory of a tool and its children 200 times a second takes a fifth of a core, and is of no use here.
    monkeypatch.setattr(measuring, "_POLL_SECS", 0.1)
    for part in (offline, initial, bagel):
        monkeypatch.setattr(part, "measure", measure_forked)
    benchmark.main("12M", shards=2, runs=1, directory=tmp_path, json_file=tmp_path / "figures.json")
    figures = json.loads((tmp_path / "figures.json").read_text())
    broken = int(torch.__version__.startswith(("2.11.", "2.12.")))  # dcp.async_save with a stager raises there
    assert len(figures["save"]) == 10 - 2 * broken
    assert len(figures["save"]["pauses"]) == 3 - broken
    assert len(figures["one-write"]) == 6
    assert len(figures["offline"]) == 4
    assert len(figures["initial"]) == 7
    assert len(figures["bagel"]) == 4
    assert {"shardsmith HFExport", "pauses"} < figures["live"].keys()
    assert {"structure", "GB/s a core"} < figures["diagnose"].keys()
