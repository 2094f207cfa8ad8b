"""A map of a model's tensors, layers by kinds, as inline SVG; each cell leads to the tensor's row in the table."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from shardsmith.reports.page import safe

# Of several numbers the first counts: those behind it, such as of experts, become "*" in the kind.
_LAYER = re.compile(r"^(?P<stack>.*?)\.?\b(?P<layer>[0-9]+)\.(?P<kind>.+)$")
_CELL = 15
_MOST_COLUMNS = 60
_CHARACTER = 6
"""Width of a letter in a label, about."""
_MOST_CHARACTERS = 48
"""Of a label. Longer ones lose their middle; the whole name is in the table."""
_PALETTE = (210, 30, 130, 280, 350, 180, 60, 320)
"""Hues that stand apart."""

Colour = Callable[[float | str | None], str]


@dataclass(frozen=True, slots=True)
class Cell:
    """One tensor in a map."""

    name: str
    value: float | str | None
    """What gives the colour; None for nothing known."""
    text: str
    """What is shown where the cell is pointed at."""
    row: str
    """Anchor of its row in the table."""


@dataclass(slots=True)
class _Stack:
    """The layers of one list of modules, or all tensors outside of such lists."""

    title: str
    rows: dict[str, dict[str, list[Cell]]] = field(default_factory=dict)
    """By number of the layer, then by kind."""

    def kinds(self) -> list[str]:
        return list(dict.fromkeys(kind for row in self.rows.values() for kind in row))


def tensor_map(cells: Sequence[Cell], colour: Colour) -> str:
    """Return the map: a grid for each stack of layers, and a row for what is in none."""
    return "".join(f'<div class="wide">{"".join(_grid(stack, colour))}</div>' for stack in _stacks(cells))


def by_difference(value: float | str | None) -> str:
    """Colour a relative difference: green for none, from yellow (1e-6) to red (1 and more), black for not a number."""
    if value is None:
        return "var(--quiet)"
    if not isinstance(value, float) or math.isnan(value):
        return "#000"
    # Green stands for exactly equal, and for nothing that only rounds to it.
    if value == 0:
        return "hsl(130 35% 55%)"
    # Six decades, from 1e-6 to 1, from yellow (hue 50) to red (hue 0).
    share = min(1.0, max(0.0, (math.log10(value) + 6) / 6)) if math.isfinite(value) else 1.0
    return f"hsl({50 - 50 * share:.0f} 85% {62 - 20 * share:.0f}%)"


def by_size(values: Sequence[float]) -> Colour:
    """Return a colouring from pale (the least of the values) to dark blue (the greatest), on a logarithmic scale."""
    logarithms = [math.log10(value) for value in values if value > 0 and math.isfinite(value)]
    low, high = min(logarithms, default=0.0), max(logarithms, default=0.0)

    def colour(value: float | str | None) -> str:
        if not isinstance(value, float | int) or not (value > 0 and math.isfinite(value)):
            return "var(--quiet)"
        # All values equal: a middle blue.
        share = (math.log10(value) - low) / (high - low) if high > low else 0.5
        return f"hsl(215 70% {78 - 48 * share:.0f}%)"

    return colour


def by_kind(values: Sequence[str]) -> Colour:
    """Return a colouring that gives each of some words a hue of its own, in order of first use."""
    # With more words than hues two share one.
    hues = {value: _PALETTE[i % len(_PALETTE)] for i, value in enumerate(dict.fromkeys(values))}
    return lambda value: f"hsl({hues[str(value)]} 50% 55%)" if str(value) in hues else "var(--quiet)"


def legend(entries: Mapping[str, str]) -> str:
    """Return a line of labels, each with its colour."""
    marks = "".join(
        f'<span style="display:inline-block;width:.9em;height:.9em;background:{colour}"></span> {safe(label)} &ensp;'
        for label, colour in entries.items()
    )
    return f"<p>{marks}</p>"


def _stacks(cells: Sequence[Cell]) -> list[_Stack]:
    stacks: dict[str, _Stack] = {}
    for cell in cells:
        match = _LAYER.match(cell.name)
        title, layer = (match["stack"], match["layer"]) if match else ("", "")
        kind = re.sub(r"\b[0-9]+\b", "*", match["kind"]) if match else cell.name
        rows = stacks.setdefault(title, _Stack(title)).rows
        rows.setdefault(layer, {}).setdefault(kind, []).append(cell)
    for stack in stacks.values():
        # By number: names in a file may be sorted as text. What is in no layer has no number.
        stack.rows = dict(sorted(stack.rows.items(), key=lambda row: int(row[0] or 0)))
    return list(stacks.values())


def _grid(stack: _Stack, colour: Colour) -> Iterator[str]:
    kinds = stack.kinds()[:_MOST_COLUMNS]
    above = [_label(kind) for kind in kinds]
    beside = [_label(f"{stack.title} {layer}".strip()) for layer in stack.rows]
    # The width that the longest label takes; the labels above are turned by 50 degrees, so their height is less.
    left = 12 + _CHARACTER * max(map(len, beside))
    top = 16 + int(0.85 * _CHARACTER * max(map(len, above)))
    # A turned label leans to the right, over the last column.
    width, height = left + _CELL * len(kinds) + top, top + _CELL * len(stack.rows) + 8
    label = safe(stack.title or "tensors outside of layers")
    yield f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">'
    for i, text in enumerate(above):
        x, y = left + _CELL * i + 10, top - 5
        yield f'<text transform="translate({x} {y}) rotate(-50)">{safe(text)}</text>'
    for j, (text, row) in enumerate(zip(beside, stack.rows.values(), strict=True)):
        y = top + _CELL * j
        yield f'<text x="{left - 6}" y="{y + 11}" text-anchor="end">{safe(text)}</text>'
        yield from (_cell(row[kind], left + _CELL * i, y, colour) for i, kind in enumerate(kinds) if kind in row)
    yield "</svg>"
    if len(stack.kinds()) > _MOST_COLUMNS:
        yield f"<p>{len(stack.kinds()) - _MOST_COLUMNS} more kinds are in the table alone</p>"


def _label(text: str) -> str:
    half = _MOST_CHARACTERS // 2
    return text if len(text) <= _MOST_CHARACTERS else f"{text[: half - 1]}…{text[-half:]}"


def _cell(cells: Sequence[Cell], x: int, y: int, colour: Colour) -> str:
    """One square; of several tensors, such as the experts of a layer, the one with the greatest value is shown."""
    numbers = [cell for cell in cells if isinstance(cell.value, float)]
    # What is worst, or NaN, must not be hidden by the many.
    shown = max(numbers, key=lambda cell: _order(cell.value)) if numbers else cells[0]
    more = f" (and {len(cells) - 1} more tensors)" if len(cells) > 1 else ""
    return (
        f'<a href="#{shown.row}"><rect x="{x}" y="{y}" width="{_CELL - 1}" height="{_CELL - 1}" '
        f'fill="{colour(shown.value)}"><title>{safe(shown.name + ": " + shown.text + more)}</title></rect></a>'
    )


def _order(value: float | str | None) -> float:
    return math.inf if not isinstance(value, float) or math.isnan(value) else value
