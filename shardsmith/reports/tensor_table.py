"""A table that can be sorted by a click on a heading and searched; a row for each tensor, say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from shardsmith.reports.page import safe

_LONG = 60
"""Texts with more characters are broken into lines."""
Value = str | float | int | None


def sortable_table(columns: Sequence[str], rows: Iterable[tuple[str, Sequence[Value]]], searched: str) -> list[str]:
    """Return a table with a field to search it. Sorting and searching need the page's script; reading does not.

    Args:
        columns: Headings.
        rows: For each row its anchor and its cells. Numbers are right-aligned and sorted by value,
            NaN as the greatest.
        searched: What is searched, for the field's label.
    """
    head = "".join(f"<th>{safe(name)}</th>" for name in columns)
    body = "\n".join(f'<tr id="{anchor}">{"".join(map(_cell, cells))}</tr>' for anchor, cells in rows)
    return [
        f'<div><input type="search" placeholder="search {safe(searched)}" aria-label="search {safe(searched)}"></div>',
        '<div class="listing"><table class="sortable">',
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>",
    ]


def number_text(value: float) -> str:
    """Return a number as a table shows it: whole ones with separators, others with four digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _cell(value: Value) -> str:
    if value is None:
        # Empty and not 0: the script sorts it behind all numbers.
        return '<td data-value=""></td>'
    if isinstance(value, str):
        return f'<td class="long">{safe(value)}</td>' if len(value) > _LONG else f"<td>{safe(value)}</td>"
    sorted_by = {"inf": "Infinity", "-inf": "-Infinity", "nan": "NaN"}.get(str(value), value)  # as scripts write them
    return f'<td class="number" data-value="{sorted_by}">{number_text(value)}</td>'
