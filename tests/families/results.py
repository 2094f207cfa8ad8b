"""What became of each class, as data, as a line of a file, and as docs/families.md."""

from __future__ import annotations

import datetime
import json
import re
import textwrap
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import torch
import transformers

from .tiny import Family

RIGHT = "right"
NOT_ASKED = "not asked: "
"""Beginning of an outcome that is neither right nor wrong: the model takes nothing that we know how to make up."""
EXPORTS = ("base, flat", "base, nested", "config alone", "bfloat16", "live")
QUICK = (*EXPORTS, "logits", "verify", "diagnose")
"""Columns that need one process."""
COLUMNS = (*EXPORTS, "2 ranks", "logits", "verify", "diagnose")


@dataclass(slots=True)
class Result:
    """What became of one class."""

    family: Family
    left_out: str = ""
    """Why it was not tried; empty if it was."""
    outcomes: dict[str, str] = field(default_factory=dict)
    """Column -> ``RIGHT``, why it was not asked, or what was wrong."""

    @property
    def is_right(self) -> bool:
        return not self.left_out and not self.wrong

    @property
    def unasked(self) -> bool:
        return any(said.startswith(NOT_ASKED) for said in self.outcomes.values())

    @property
    def wrong(self) -> dict[str, str]:
        """Column -> what was wrong there."""
        return {c: said for c, said in self.outcomes.items() if said != RIGHT and not said.startswith(NOT_ASKED)}


def as_json(result: Result) -> str:
    """One line of a file of results."""
    return json.dumps([result.family.kind, result.left_out, result.outcomes])


def from_json(line: str, family: Family) -> Result:
    """The result that is in a line."""
    _, left_out, outcomes = json.loads(line)
    return Result(family, left_out, outcomes)


def summary(results: Sequence[Result]) -> str:
    """How many classes are right, how many are not, and how many were left out."""
    tried = [result for result in results if not result.left_out]
    right = sum(result.is_right for result in tried)
    return f"{right} of {len(tried)} classes right, {len(results) - len(tried)} left out"


def table(results: Sequence[Result], classes: int, types: Collection[str], day: datetime.date) -> str:
    """The results as Markdown.

    Args:
        results: One a class.
        classes: How many the library lists.
        types: Every model type of them.
        day: Of the sweep.
    """
    versions = f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}"
    tried = [result for result in results if not result.left_out]
    seen = {result.family.model_type for result in results}
    lines = [
        "# Model classes of transformers, tried one by one",
        "",
        "Made by `make families`. Each class is made tiny from its config and saved: by plain `dcp.save`, flat and",
        "nested, and by `ShardedSave` on two FSDP2 ranks. The saves are converted by `to-hf` with the base model",
        "and with config.json alone, the model is exported live by one process and by the two ranks, and the",
        "results are verified and diagnosed. Right is what the library says: the files are those of its",
        "`save_pretrained`, its `from_pretrained` gives the state dict, bit for bit, and the class answers with our",
        "files what it answers with its own, to the last bit.",
        "",
        f"{day}, {versions}: {summary(results)}.",
        f"The library lists {classes} classes of {len(types)} model types; {len(results)} classes of",
        f"{len(seen)} types were taken.",
        "",
        *_counts(tried),
        "",
        "## Right in all",
        "",
        *_names(r for r in tried if r.is_right and not r.unasked),
        "",
        "## Right in all that was asked",
        "",
        "No inputs are known that the class takes, or it needs a package that is not there, so no logits were",
        "compared. Its files are compared all the same.",
        "",
        *_names(r for r in tried if r.is_right and r.unasked),
        "",
        "## Not right",
        "",
        "| class | columns | what was said |",
        "|---|---|---|",
    ]
    lines += [_row(r, "all" if len(r.wrong) == len(COLUMNS) else ", ".join(r.wrong)) for r in tried if r.wrong]
    lines += ["", "## Left out", "", "| class | why |", "|---|---|"]
    lines += [_row(r) for r in results if r.left_out]
    return "\n".join(lines) + "\n"


def _names(results: Iterable[Result]) -> list[str]:
    return textwrap.wrap(", ".join(sorted(result.family.kind for result in results)), 120)


def _counts(tried: Sequence[Result]) -> list[str]:
    """How many were right in each column, and what that makes in all."""
    lines = ["| column | right | not asked | wrong |", "|---|---|---|---|"]
    for column in COLUMNS:
        outcomes = [result.outcomes[column] for result in tried if column in result.outcomes]
        right, unasked = outcomes.count(RIGHT), sum(said.startswith(NOT_ASKED) for said in outcomes)
        lines.append(f"| {column} | {right} | {unasked} | {len(outcomes) - right - unasked} |")
    return lines


def _row(result: Result, *cells: str) -> str:
    """What was said of a class, short, and without the names of folders that were made for it."""
    said = result.left_out or next(iter(result.wrong.values()))
    plain = re.sub(r"\S*/(?=(base|bare):)", "", said).replace("|", "/").replace("<", "&lt;")
    begun = "".join(f"| {cell} " for cell in (result.family.kind, *cells))
    return f"{begun}| {textwrap.shorten(plain, 116 - len(begun), placeholder=' ...')} |"
