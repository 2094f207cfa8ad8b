"""What a user writes for ``keep=``: ``latest(3) | best("eval_loss", keep=2) | multiples_of(10_000)``."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from shardsmith.checking.arguments import checked
from shardsmith.checking.types import Count, Positive
from shardsmith.errors import UsageError
from shardsmith.ground.bounded import lines_of
from shardsmith.ground.layout import METRICS_FILE
from shardsmith.ground.remote_path import RemotePath
from shardsmith.manifest.retention import Best, Retention


@checked
def latest(count: Count) -> Retention:
    """Keep the ``count`` newest checkpoints."""
    return Retention(newest=count)


@checked
def multiples_of(steps: Count) -> Retention:
    """Keep each checkpoint whose step is a multiple of ``steps``: the milestones that rotation spares."""
    return Retention(multiples=frozenset([steps]))


@checked
def best(metric: str, *, keep: Count = 1, mode: Literal["min", "max"] = "min") -> Retention:
    """Keeps the checkpoints with the best values of a metric, which ``hooks.metric(step, eval_loss=2.1)`` tells.

    A value may come after later steps are saved: steps after the last one with a value are kept until theirs comes.

    Args:
        metric: Its name, as ``hooks.metric`` gives it.
        keep: How many.
        mode: Whether the smallest values are the best, or the largest. NaN is the worst.
    """
    return Retention(bests=frozenset([Best(metric, keep, mode)]))


@checked
def newer_than(*, days: Positive | None = None, hours: Positive | None = None) -> Retention:
    """Keeps what was saved within so many days and hours, by the time of its directory."""
    if days is None and hours is None:
        raise UsageError("newer_than() names no time: write newer_than(days=2) or newer_than(hours=6)")
    return Retention(newer_secs=86400 * (days or 0) + 3600 * (hours or 0))


@checked
def keep_if(condition: Callable[[int], bool]) -> Retention:
    """Keeps each checkpoint for whose step the function is true. Rank 0 calls it, in the background."""
    return Retention(conditions=frozenset([condition]))


def add_metrics(directory: Path, step: int, values: Mapping[str, float]) -> None:
    """Append the metrics of a step to the file beside the step directories. Raises OSError."""
    line = json.dumps({"step": step, **values}) + "\n"
    place = directory / METRICS_FILE
    if isinstance(place, RemotePath):  # where nothing can be appended to
        place.store.put(place.key, "".join([*lines_of(place), line]).encode())
        return
    # O_APPEND and one write: a kill leaves one broken line at most.
    descriptor = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    with os.fdopen(descriptor, "wb") as file:
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())
