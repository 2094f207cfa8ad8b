"""``python -m tests.gpu``: all that is tested and measured on a device, in one run, with a table at the end.

Needs torch and what ``make gpu-wheels`` has collected, or has installed; no network and no compiler.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

try:
    import torch
except ModuleNotFoundError as error:
    sys.exit(f"{sys.executable}: {error}; name a Python that has torch, as in: make gpu PYTHON=.venv/bin/python")

from tests.gpu.devices import VARIABLE
from tests.gpu.packages import ROOT

_MOST_LINES = 60
_FOR_FIGURES = 0.45
"""Of the time that there is."""


def main() -> int:
    arguments = _arguments()
    os.environ[VARIABLE] = arguments.device
    facts = _facts(arguments.device)
    began = time.monotonic()
    results = _run_tests(arguments, 60 * arguments.minutes * (1 - _FOR_FIGURES))
    figures: dict[str, Any] = {}
    if not arguments.only_tests:
        figures = _measure(arguments, began + 60 * arguments.minutes - time.monotonic())
    content = {**facts, "seconds": round(time.monotonic() - began), "tests": results, "figures": figures}
    name = facts["card"].lower().replace(" ", "-").replace("/", "-")
    path = arguments.output / f"gpu-{name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    print("\n".join(_table(content)))
    print(f"written to {path}")
    return 0 if all(result["outcome"] == "passed" for result in results.values()) and "error" not in figures else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    here = torch.accelerator.current_accelerator(check_available=True)
    parser.add_argument("--device", default=here.type if here else None, help="its type; cpu runs what a CPU can run")
    parser.add_argument("--minutes", type=float, default=8, help="what does not fit in is not run, and that is said")
    parser.add_argument("--parameters", default=None, help="size of the model that is measured; default by the device")
    parser.add_argument("--only-tests", action="store_true", help="measure nothing")
    parser.add_argument("--output", type=Path, default=Path.cwd(), help="folder for gpu-<card>.json")
    parser.add_argument("--directory", type=Path, default=None, help="where to write checkpoints")
    parser.add_argument("pytest", nargs="*", help="after --, for pytest: -k NAME, for one")
    arguments = parser.parse_args()
    if arguments.device is None:
        parser.error("torch sees no accelerator here; --device cpu runs what a CPU can run")
    return arguments


def _facts(kind: str) -> dict[str, Any]:
    """What ran, and where."""
    card = torch.cuda.get_device_name() if kind == "cuda" else kind
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "card": card,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": git.stdout.strip() or "not known",
        "torch": torch.__version__,
        "device": kind,
    }


class _Results:
    """A plugin of pytest: what became of each test, and what it measured. Ends the session when time is up."""

    def __init__(self, seconds: float) -> None:
        self.found: dict[str, dict[str, Any]] = {}
        self._ends = time.monotonic() + seconds

    def pytest_collection_finish(self, session: Any) -> None:
        self.found = {item.nodeid: {"outcome": "not run"} for item in session.items}

    def pytest_runtest_logreport(self, report: Any) -> None:
        entry = self.found[report.nodeid]
        if report.when == "call" or report.outcome != "passed":
            entry["outcome"] = report.outcome
            entry["seconds"] = round(report.duration, 1)
            if report.failed:
                entry["error"] = str(report.longrepr)[-4000:]
        if report.user_properties:
            entry["figures"] = dict(report.user_properties)

    def pytest_runtest_teardown(self, item: Any) -> None:
        if time.monotonic() > self._ends:
            item.session.shouldstop = "no time is left"


def _run_tests(arguments: argparse.Namespace, seconds: float) -> dict[str, dict[str, Any]]:
    import pytest

    results = _Results(seconds)
    # no conftest above the folder, which would import what is not needed here; a warning of another torch is no failure
    options = ["--confcutdir", str(ROOT / "tests" / "gpu"), "-o", "filterwarnings=default", "-o", "timeout=90", "-q"]
    options += ["-p", "no:cacheprovider", "--show-capture=no", "--tb=short", "-W", "ignore"]
    with tempfile.TemporaryDirectory(prefix="shardsmith-gpu-", dir=arguments.directory) as folder:
        pytest.main([str(ROOT / "tests" / "gpu"), *options, "--basetemp", folder, *arguments.pytest], [results])
    return results.found


def _measure(arguments: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """In a process of its own: what a failed test has left on the device does not reach it."""
    with tempfile.TemporaryDirectory(prefix="shardsmith-gpu-", dir=arguments.directory) as folder:
        written = Path(folder) / "figures.json"
        command = [
            sys.executable,
            "-c",
            _BENCH,
            "--only",
            "device",
            "--device",
            arguments.device,
            "--json",
            str(written),
        ]
        command += [
            "--directory",
            folder,
            "--parameters",
            arguments.parameters or _size(arguments.device),
            "--runs",
            "2",
        ]
        try:
            done = subprocess.run(command, cwd=ROOT, timeout=max(30.0, seconds))
        except subprocess.TimeoutExpired:
            return {"error": "no time was left"}
        if done.returncode:
            return {"error": f"the benchmark ended with {done.returncode}"}
        found: dict[str, Any] = json.loads(written.read_text())["device"]
        return found


_BENCH = (
    "import runpy, tests.gpu\n"  # which makes everything importable
    "runpy.run_module('benchmarks', run_name='__main__', alter_sys=True)"
)


def _size(kind: str) -> str:
    """Of the model, which with gradients and moments takes eight bytes a parameter."""
    if kind == "cpu":
        return "3M"
    free, _ = torch.accelerator.get_memory_info()
    return "1000M" if free > 32e9 else "300M"


def _table(content: dict[str, Any]) -> list[str]:
    """At most ``_MOST_LINES`` lines: where, what failed, what passed by file, and the figures."""
    results = content["tests"]
    lines = [
        f"{content['card']}, {content['date']}, commit {content['commit']}, torch {content['torch']}",
        f"{sum(r['outcome'] == 'passed' for r in results.values())} of {len(results)} tests passed "
        f"in {sum(r.get('seconds', 0) for r in results.values()):.0f} s; all in all {content['seconds']} s",
    ]
    by_file: dict[str, list[str]] = {}
    for name, result in results.items():
        by_file.setdefault(Path(name.split("::")[0]).stem, []).append(result["outcome"])
    for file, outcomes in by_file.items():
        lines.append(f"  {file:24} " + ", ".join(f"{outcomes.count(o)} {o}" for o in dict.fromkeys(outcomes)))
    wrong = {name.split("::")[1]: result for name, result in results.items() if result["outcome"] == "failed"}
    lines += [f"  FAILED {name[:90]}: {_last_line(result)[:100]}" for name, result in wrong.items()]
    measured = {k: v for result in results.values() for k, v in result.get("figures", {}).items()}
    lines += [f"  {name}: {value}" for name, value in {**measured, **_flat(content["figures"])}.items()]
    return lines if len(lines) <= _MOST_LINES else [*lines[: _MOST_LINES - 1], f"... {len(lines)} lines; see the file"]


def _last_line(result: dict[str, Any]) -> str:
    lines = [line for line in result.get("error", "").splitlines() if line.startswith("E ")]
    return (lines or ["?"])[0][2:].strip()


def _flat(figures: dict[str, Any]) -> dict[str, Any]:
    """A line each: of what was measured in several respects, all of them in one."""
    flat: dict[str, Any] = {}
    for name, value in figures.items():
        if not isinstance(value, dict):
            flat[name] = value
        elif any(isinstance(part, dict) for part in value.values()):
            flat |= _flat(value)
        elif all(isinstance(part, (int, float)) for part in value.values()):
            flat[name] = ", ".join(f"{part} {number:.4g}" for part, number in value.items())
        else:
            flat |= value
    return flat


if __name__ == "__main__":
    raise SystemExit(main())
