"""What became of each class, as data, as a line of a file, and as docs/families.md."""

from __future__ import annotations

import datetime
import json
from collections.abc import Collection, Sequence
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
        f"{len(seen)} types were taken, one of each type first.",
        "",
        *_counts(tried),
        "",
        f"| class | {' | '.join(COLUMNS)} |",
        f"|---|{'---|' * len(COLUMNS)}",
    ]
    lines += [f"| {r.family.kind} | {' | '.join(_cell(r.outcomes.get(c, '')) for c in COLUMNS)} |" for r in tried]
    lines += [
        "",
        "## Not asked",
        "",
        "No inputs are known that the class takes, or it needs a package that is not there.",
    ]
    lines += ["Its files are compared all the same.", "", "| class | column | why |", "|---|---|---|"]
    for r in tried:
        asked = {c: said for c, said in r.outcomes.items() if said.startswith(NOT_ASKED)}
        lines += [f"| {r.family.kind} | {c} | {_escaped(said.removeprefix(NOT_ASKED))} |" for c, said in asked.items()]
    lines += ["", "## Left out", "", "| class | why |", "|---|---|"]
    lines += [f"| {r.family.kind} | {_escaped(r.left_out)} |" for r in results if r.left_out]
    return "\n".join(lines) + "\n"


def _counts(tried: Sequence[Result]) -> list[str]:
    """How many were right in each column, and what that makes in all."""
    lines = ["| column | right | not asked | wrong |", "|---|---|---|---|"]
    for column in COLUMNS:
        outcomes = [result.outcomes[column] for result in tried if column in result.outcomes]
        right, unasked = outcomes.count(RIGHT), sum(said.startswith(NOT_ASKED) for said in outcomes)
        lines.append(f"| {column} | {right} | {unasked} | {len(outcomes) - right - unasked} |")
    return lines


def _cell(said: str) -> str:
    return "yes" if said == RIGHT else "not asked" if said.startswith(NOT_ASKED) else _escaped(said)


def _escaped(text: str) -> str:
    return text.replace("|", "/").replace("<", "&lt;")[:140]
