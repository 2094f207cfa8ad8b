"""Charts of a run as inline SVG: one number over the steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shardsmith.reports.page import safe

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 340, 150, 64, 10, 24
"""Of a chart, in pixels: as wide as a phone, and three beside each other on a wide screen."""


@dataclass(frozen=True, slots=True)
class Point:
    """One mark of a chart."""

    x: float
    y: float
    text: str
    """What is shown where it is pointed at."""
    failed: bool = False


def chart(title: str, points: Sequence[Point], text: Callable[[float], str]) -> str:
    """Return a chart with a dot for each point and a line through those that did not fail; "" without points.

    Args:
        title: What is measured.
        points: In any order; the vertical axis begins at 0.
        text: Gives a value of the vertical axis with its unit.
    """
    if not points:
        return ""
    points = sorted(points, key=lambda point: point.x)
    low, high = points[0].x, points[-1].x
    # Never 0: it is divided by.
    top = max(point.y for point in points) or 1.0

    def place(point: Point) -> tuple[float, float]:
        # A single point lies in the middle.
        share = (point.x - low) / (high - low) if high > low else 0.5
        inner = _HEIGHT - _TOP - _BOTTOM
        # 12 pixels stay free on the right, so that the last dot is whole. The vertical axis of SVG points down.
        return _LEFT + share * (_WIDTH - _LEFT - 12), _TOP + inner * (1 - point.y / top)

    # Without the failed ones: a save that broke off says nothing about the usual time.
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(point) for point in points if not point.failed))
    bottom = _HEIGHT - _BOTTOM
    return "".join(
        [
            f"<figure><figcaption>{safe(title)}</figcaption>",
            f'<svg class="chart" width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img"',
            f' aria-label="{safe(title)}">',
            f'<path d="M{_LEFT} {_TOP}V{bottom}H{_WIDTH - 12}" fill="none" stroke="var(--quiet)"/>',
            _label(_LEFT - 6, _TOP + 4, text(top), "end"),
            _label(_LEFT - 6, bottom, "0", "end"),
            _label(_LEFT, _HEIGHT - 8, f"step {low:g}", "start"),
            _label(_WIDTH - 12, _HEIGHT - 8, f"step {high:g}", "end") if high > low else "",
            # Before the dots, which lie on top of the line.
            f'<polyline points="{line}" fill="none" stroke="var(--note)" stroke-width="1.5"/>',
            *(_dot(*place(point), point) for point in points),
            "</svg></figure>",
        ]
    )


def _label(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{safe(text)}</text>'


def _dot(x: float, y: float, point: Point) -> str:
    colour = "var(--error)" if point.failed else "var(--note)"
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"><title>{safe(point.text)}</title></circle>'
