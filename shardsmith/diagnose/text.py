"""A diagnosis on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from shardsmith.compare.findings import Diagnosis, Finding, Looked
from shardsmith.ground.printable import printable

_SHOWN_NAMES = 8
_SHOWN_TEXT = 400
_COLOURS = {"error": "bold red", "warning": "yellow", "note": "cyan"}
TITLES = {
    "structure": "names, shapes and counts",
    "values": "every tensor against the model's",
    "model": "config, tokenizer, buffers and logits",
}


def print_diagnosis(diagnosis: Diagnosis, console: Console) -> None:
    """Facts a level, then what is wrong, then what only looks wrong, and what it comes to."""
    console.print(f"{diagnosis.checkpoint}  ({diagnosis.format})\nagainst {diagnosis.model}")
    for level in diagnosis.levels:
        _print_level(level, console)
    for finding in diagnosis.faults:
        console.print(_finding(finding))
    if diagnosis.notes:
        console.print(_notes(diagnosis.notes))
    for line in diagnosis.unseen:
        console.print(Text.assemble(("not looked at", "yellow"), f" {shorten(line)}"))
    for line in diagnosis.inapplicable:
        console.print(Text.assemble(("does not apply", "cyan"), f" {shorten(line)}"))
    console.print(Text(diagnosis.verdict, "bold red" if diagnosis.faults else "bold green"))


def shorten_names(names: Sequence[str]) -> str:
    """The first of many names, and how many more there are."""
    more = len(names) - _SHOWN_NAMES
    return printable(", ".join(names[:_SHOWN_NAMES])) + (f" and {more} more" if more > 0 else "")


def shorten(text: str) -> str:
    """Return a text that fits into a report; JSON has all of it."""
    lines = [printable(line) for line in text[:_SHOWN_TEXT].split("\n")]
    return "\n".join(lines) + (" ... (--json shows all)" if len(text) > _SHOWN_TEXT else "")


def fact_text(value: Any) -> str:
    """Return a number with separators, a list with commas."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def rows_of(facts: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(model or nothing, name, value) of a level's facts, which are by model or stand alone."""
    rows = []
    for name, value in facts.items():
        if isinstance(value, dict):
            rows += [(name, inner, fact_text(what)) for inner, what in value.items()]
        else:
            rows.append(("", name, fact_text(value)))
    return rows


def _print_level(level: Looked, console: Console) -> None:
    # The last that holds counts: findings before gaps before what cannot be asked.
    wrong = sum(finding.severity != "note" for finding in level.findings)
    state = Text(f"{wrong} finding{'' if wrong == 1 else 's'}", "red") if wrong else Text("nothing wrong", "green")
    if level.inapplicable and not wrong:
        state = Text("not for such a model", "cyan")
    if level.unseen and not wrong:
        state = Text("not all could be looked at", "yellow")
    console.print(Text.assemble("\n", (level.level, "bold"), f" ({TITLES[level.level]}): "), state, sep="")
    if level.facts:
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        for row in rows_of(level.facts):
            table.add_row(*row)
        console.print(table)


def _finding(finding: Finding) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row(Text(f"\n{finding.severity}", _COLOURS[finding.severity]), Text(f"\n{finding.code}", "bold"))
    for name, text in _lines(finding):
        table.add_row(name, Text(text))
    return table


def _lines(finding: Finding) -> list[tuple[str, str]]:
    return [
        ("where", shorten_names(finding.where)),
        ("expected", shorten(finding.expected)),
        ("found", shorten(finding.found)),
        ("the loss", finding.effect),
        ("fix", finding.fix),
    ]


def _notes(notes: Sequence[Finding]) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0), title="\nno fault", title_justify="left")
    for note in notes:
        table.add_row(Text(note.code, "cyan"), Text(f"{shorten_names(note.where)}: {shorten(note.found)}"))
    return table
