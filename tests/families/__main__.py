"""``python -m tests.families [--each-type] [NAME ...]``: every class, or those named; writes docs/families.md."""

from __future__ import annotations

import argparse
import collections
import logging
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

from .round_trip import COLUMNS, RIGHT, Result, round_trip
from .tiny import all_families, one_of_each_type

TABLE = Path(__file__).parents[2] / "docs" / "families.md"


def main() -> int:
    """Run, print a line for each class that is not right, write the table; 1 if any is not."""
    parser = argparse.ArgumentParser(prog="python -m tests.families", description=__doc__)
    parser.add_argument("--each-type", action="store_true", help="one class of each model type")
    parser.add_argument("--part", default="0/1", help="which share of the classes, as 0/4")
    parser.add_argument("--output", type=Path, default=TABLE)
    parser.add_argument("names", nargs="*")
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    families = one_of_each_type() if given.each_type else all_families()
    part, parts = map(int, given.part.split("/"))
    chosen = [f for f in families if not given.names or f.kind in given.names or f.model_type in given.names]
    results: list[Result] = []
    for family in chosen[part::parts]:
        with tempfile.TemporaryDirectory(prefix="shardsmith-families-") as folder:
            begun = time.process_time()
            results.append(round_trip(family, Path(folder)))
        _print(results[-1], time.process_time() - begun)
    if not given.names:
        given.output.write_text(table(results))
    print(summary(results))
    return int(any(not r.is_right and not r.left_out for r in results))


def summary(results: list[Result]) -> str:
    """How many classes are right, how many are not, and how many were left out."""
    tried = [result for result in results if not result.left_out]
    right = sum(result.is_right for result in tried)
    return f"{right} of {len(tried)} classes right, {len(results) - len(tried)} left out"


def table(results: list[Result]) -> str:
    """The results as Markdown."""
    lines = [
        "# Model classes of transformers, tried one by one",
        "",
        "Made by `make families`. Each class is made tiny from its config, saved by plain `dcp.save`, converted",
        "by `to-hf` with its base model and with config.json alone, exported live, verified and diagnosed. Right",
        "is what the library says: the files are those of its `save_pretrained`, and its `from_pretrained` gives",
        "the state dict, bit for bit.",
        "",
        f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}: {summary(results)}.",
        "",
        f"| class | {' | '.join(COLUMNS)} |",
        f"|---|{'---|' * len(COLUMNS)}",
    ]
    for result in results:
        if not result.left_out:
            cells = [
                "yes" if result.outcomes[c] == RIGHT else result.outcomes[c].replace("|", "/")[:120] for c in COLUMNS
            ]
            lines.append(f"| {result.family.kind} | {' | '.join(cells)} |")
    lines += ["", "## Left out", "", "| class | why |", "|---|---|"]
    lines += [f"| {r.family.kind} | {r.left_out.replace('|', '/')} |" for r in results if r.left_out]
    return "\n".join(lines) + "\n"


def _print(result: Result, seconds: float) -> None:
    if result.left_out:
        print(f"{result.family.kind}: left out: {result.left_out}", flush=True)
    elif not result.is_right:
        wrong = collections.OrderedDict((c, said) for c, said in result.outcomes.items() if said != RIGHT)
        print(f"{result.family.kind} ({seconds:.1f} s): {dict(wrong)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
