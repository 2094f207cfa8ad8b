"""The page of ``inspect RUN --html``: the steps, their sizes, and what the events of the run say about time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shardsmith.ground.sizes import size_text
from shardsmith.overview import RunOverview, StepSummary
from shardsmith.reports.chart import Point, chart
from shardsmith.reports.page import make_page, safe, section
from shardsmith.reports.tensor_table import Value, sortable_table

Events = Sequence[Mapping[str, Any]]
_STEPS = (
    "step",
    "directory",
    "kind",
    "format",
    "models",
    "bytes",
    "ranks",
    "seconds waited",
    "health",
    "at the next save",
)
_EVENTS = ("step", "kind", "directory", "seconds", "seconds waited", "bytes", "ranks", "result")


def run_page(found: RunOverview, events: Events, command: Sequence[str]) -> str:
    """Return the page.

    Args:
        found: The steps of the run.
        events: What the run's ``events.jsonl`` says, oldest first; without any there are no times.
        command: The command that makes the page.
    """
    damaged = sum(bool(step.problems) for step in found.steps)
    verdict = f"{len(found.steps)} directories of steps, {size_text(sum(step.nbytes for step in found.steps))}"
    verdict += f"; {damaged} damaged" if damaged else "; none is damaged"
    parts = [f'<p class="verdict{" bad" if damaged else ""}">{safe(verdict)}</p>']
    parts += section("Problems", [f'<p class="bad-text">{safe(problem)}</p>' for problem in found.problems])
    charts = "".join(_charts(found, events))
    parts += section("Over the steps", [f'<div class="charts">{charts}</div>'] if charts else [])
    parts += section("Steps", sortable_table(_STEPS, _rows("s", [_step(one, found) for one in found.steps]), "steps"))
    parts += section("What is kept", _kept(found))
    parts += section("Events", _events(events))
    left = [f"<p><code>{safe(one.path)}</code>: {one.kind}, {size_text(one.nbytes)}</p>" for one in found.leftovers]
    parts += section("What shardsmith clean can delete", left)
    return make_page(found.path, parts, command)


def _charts(found: RunOverview, events: Events) -> Iterator[str]:
    for kind in ("checkpoint", "export"):
        steps = [one for one in found.steps if one.kind == kind]
        sizes = [Point(one.step, one.nbytes, f"{one.path}: {size_text(one.nbytes)}") for one in steps]
        yield chart(f"Size of each {kind}", sizes, _size)
    for kind in ("save", "export"):
        of_kind = [event for event in events if event["kind"] == kind]
        yield chart(f"Seconds that the training waited for each {kind}", _points(of_kind, "seconds_waited"), _seconds)
        yield chart(f"Seconds from the beginning to the end of each {kind}", _points(of_kind, "seconds"), _seconds)
    yield chart(
        "Distance of the average from the weights, relative to the weights", _distances(events), "{:.3g}".format
    )


def _size(nbytes: float) -> str:
    return size_text(int(nbytes))


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:,.0f} s"


def _points(events: Events, field: str) -> list[Point]:
    return [
        # Failed ones as well: a point says how long it took until the failure.
        Point(
            event["step"],
            event[field],
            f"step {event['step']}: {_seconds(event[field])}"
            + (f", failed: {event['error']}" if event["error"] else ""),
            failed=bool(error),
        )
        for event in events
        for error in [event["error"] or ""]
    ]


def _distances(events: Events) -> list[Point]:
    """Of the saves whose events have it: those of runs with an average, and of no older version."""
    return [
        Point(event["step"], distance, f"step {event['step']}: {distance:.3g}")
        for event in events
        if isinstance(distance := event.get("ema_distance"), float) and math.isfinite(distance)
    ]


def _step(one: StepSummary, run: RunOverview) -> list[Value]:
    models = " ".join(one.models)
    known: list[Value] = [one.step, one.path, one.kind, one.format, models, one.nbytes, one.world_size]
    return [*known, one.seconds_waited, one.health, run.next_save(one)]


def _kept(found: RunOverview) -> list[str]:
    going = {folder.path: ", ".join(map(str, folder.removes)) or "nothing" for folder in found.retention}
    return [
        f"<p><code>{safe(folder.path)}</code> keeps <code>{safe(folder.policy)}</code>; the next step there removes "
        f"{safe(going[folder.path])}</p>"
        for folder in found.retention
    ]


def _events(events: Events) -> list[str]:
    rows: list[list[Value]] = [
        [
            event["step"],
            event["kind"],
            # The step and the folder above it tell it apart; the rest of the path is the run's.
            "/".join(Path(event["path"]).parts[-2:]),
            event["seconds"],
            event["seconds_waited"],
            event["nbytes"],
            event["ranks"],
            event["error"] or "well",
        ]
        for event in events
    ]
    return sortable_table(_EVENTS, _rows("e", rows), "events") if rows else []


def _rows(letter: str, rows: Sequence[list[Value]]) -> Iterator[tuple[str, list[Value]]]:
    """With an anchor for each row."""
    return ((f"{letter}{i}", row) for i, row in enumerate(rows))
