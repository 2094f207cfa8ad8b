"""When each thread of each rank does what in a save: recorded while it runs, drawn as SVG."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

from shardsmith.run_state.save import SaveInProgress

_PHASES = {
    "_collect": ("collect", "#9aa5b1"),
    "_stage": ("copy", "#e07a5f"),
    "_write": ("write, digest, CRC, hash", "#3d7ea6"),
    "_commit": ("index, metadata.json, rename", "#81b29a"),
}
"""Method of ``SaveInProgress`` -> what it does, and the colour of that."""
_LANE, _LEFT, _WIDTH, _TOP = 26, 190, 700, 34


@dataclass(frozen=True, slots=True)
class Event:
    """Something that one thread did."""

    lane: str
    phase: str
    begin: float
    """In seconds of the system's monotonic clock, which all processes of a machine share."""
    end: float


@contextmanager
def recorded(rank: int) -> Iterator[list[Event]]:
    """Within it the phases of saves are recorded, in a list that grows."""
    events: list[Event] = []
    before = {name: getattr(SaveInProgress, name) for name in _PHASES}
    for name, method in before.items():
        # On the class: hooks make an object for each save.
        setattr(SaveInProgress, name, _recording(method, _PHASES[name][0], rank, events))
    try:
        yield events
    finally:
        for name, method in before.items():
            setattr(SaveInProgress, name, method)


def _recording(method: Callable[..., Any], phase: str, rank: int, events: list[Event]) -> Callable[..., Any]:
    @functools.wraps(method)
    def run(*args: Any, **options: Any) -> Any:
        is_main = threading.current_thread() is threading.main_thread()
        begin = time.monotonic()
        try:
            return method(*args, **options)
        finally:
            lane = f"rank {rank}, {'training' if is_main else 'background'}"
            events.append(Event(lane, phase, begin, time.monotonic()))

    return run


def draw(events: Sequence[Event], waits: float, title: str) -> str:
    """Return an SVG with a lane for each thread.

    Args:
        events: Of all ranks.
        waits: For how many seconds the training waits, from the first event on.
        title: Written above.
    """
    start = min(event.begin for event in events)
    span = max(event.end for event in events) - start
    # The training's lane above the background's, rank by rank.
    lanes = sorted({event.lane for event in events}, key=lambda lane: (lane.split(",")[0], "background" in lane))
    height = _TOP + _LANE * len(lanes) + 58

    def x(seconds: float) -> float:
        return _LEFT + _WIDTH * seconds / span

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDTH + 30}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="100%" height="100%" fill="white"/><text x="10" y="18" font-weight="bold">{escape(title)}</text>',
        f'<rect x="{_LEFT}" y="{_TOP}" width="{x(waits) - _LEFT:.1f}" height="{_LANE * len(lanes)}" fill="#fbe9e7"/>',
    ]
    for i, lane in enumerate(lanes):
        y = _TOP + _LANE * i
        lines.append(f'<text x="10" y="{y + 17}">{escape(lane)}</text>')
        for event in events:
            if event.lane == lane:
                # At least a pixel: a phase that took no time is still to be seen.
                left, width = x(event.begin - start), max(1.0, _WIDTH * (event.end - event.begin) / span)
                colour = dict(_PHASES.values())[event.phase]
                lines.append(
                    f'<rect x="{left:.1f}" y="{y + 4}" width="{width:.1f}" height="{_LANE - 8}" fill="{colour}">'
                    f"<title>{escape(event.phase)}: {1e3 * (event.end - event.begin):.1f} ms</title></rect>"
                )
    below = _TOP + _LANE * len(lanes)
    for tick in range(5):
        seconds = span * tick / 4
        lines.append(f'<text x="{x(seconds):.1f}" y="{below + 16}" text-anchor="middle">{1e3 * seconds:.0f} ms</text>')
    at = 10.0
    for name, colour in (*_PHASES.values(), ("the training waits", "#fbe9e7")):
        lines.append(f'<rect x="{at}" y="{below + 30}" width="12" height="12" fill="{colour}"/>')
        lines.append(f'<text x="{at + 17}" y="{below + 40}">{escape(name)}</text>')
        # About the width of the text.
        at += 42 + 6.4 * len(name)
    return "\n".join([*lines, "</svg>", ""])
