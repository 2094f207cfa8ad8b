"""``python -m tests.families [--each-type] [NAME ...]``: every class, or those named; writes docs/families.md.

What is done is kept in a file, a line a class, so that a sweep can be cut into parts, and goes on where it ended.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from .results import Result, as_json, from_json, summary, table
from .round_trip import round_trip
from .tiny import Family, all_families, one_of_each_type

ROOT = Path(__file__).parents[2]


def main() -> int:
    """Run what is not done yet, print a line for each class that is not right, write the table; 1 if any is not."""
    given = _arguments()
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    every = {family.kind: family for family in all_families()}
    first = one_of_each_type()
    chosen = first if given.each_type else [*first, *(f for f in every.values() if f not in first)]
    chosen = [f for f in chosen if not given.names or f.kind in given.names or f.model_type in given.names]
    done = _done(given.results, every)
    again = {kind for kind, result in done.items() if given.again and not result.is_right}
    part, parts = map(int, given.part.split("/"))
    _run([f for f in chosen[part::parts] if f.kind not in done or f.kind in again or given.names], given)
    done = _done(given.results, every)
    results = [done[family.kind] for family in chosen if family.kind in done]
    if not given.names:
        types = {family.model_type for family in every.values()}
        given.output.write_text(table(results, len(every), types, datetime.date.today()))
    print(summary(results))
    return int(any(result.wrong for result in results))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.families", description=__doc__)
    parser.add_argument("--each-type", action="store_true", help="one class of each model type")
    parser.add_argument("--part", default="0/1", help="which share of the classes, as 0/4")
    parser.add_argument("--seconds", type=float, help="begin no class after so long")
    parser.add_argument("--again", action="store_true", help="try those again that were not right or left out")
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "families.jsonl", help="what is done")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "families.md")
    parser.add_argument("names", nargs="*")
    return parser.parse_args()


def _run(families: Iterable[Family], given: argparse.Namespace) -> None:
    begun = time.monotonic()
    given.results.parent.mkdir(exist_ok=True)
    for family in families:
        if given.seconds and time.monotonic() - begun > given.seconds:
            return
        with tempfile.TemporaryDirectory(prefix="shardsmith-families-") as folder:
            before = time.process_time()
            result = round_trip(family, Path(folder))
        with given.results.open("a") as results:  # one line in one write: several parts may run at a time
            results.write(as_json(result) + "\n")
        _print(result, time.process_time() - before)


def _done(file: Path, every: dict[str, Family]) -> dict[str, Result]:
    """The last result of each class."""
    lines = file.read_text().splitlines() if file.exists() else []
    return {kind: from_json(line, every[kind]) for line in lines if (kind := json.loads(line)[0]) in every}


def _print(result: Result, seconds: float) -> None:
    if result.left_out:
        print(f"{result.family.kind}: left out: {result.left_out}", flush=True)
    elif result.wrong:
        print(f"{result.family.kind} ({seconds:.1f} s): {result.wrong}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
