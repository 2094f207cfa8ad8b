"""Which committed steps of a folder stay: the policy, which ``hooks/retention.py`` makes, and what it decides by."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shardsmith.checking.arguments import checked_fields
from shardsmith.checking.types import Count, NotNegative, StepNumber
from shardsmith.errors import UsageError
from shardsmith.ground.bounded import lines_of
from shardsmith.ground.layout import METADATA_FILE, METRICS_FILE, PROVENANCE_FILE, step_name
from shardsmith.ground.remote_path import RemotePath


@dataclass(frozen=True, slots=True)
class Best:
    """The steps with the best values of a metric."""

    metric: str
    count: int
    mode: Literal["min", "max"]

    def keep(self, steps: Sequence[int], metrics: Mapping[int, Mapping[str, float]]) -> set[int]:
        """Return the best of ``steps``, and those after the last one whose value is known: theirs may still come."""
        known = {step: metrics[step][self.metric] for step in steps if self.metric in metrics.get(step, {})}
        sign = 1 if self.mode == "min" else -1
        ranked = sorted(known, key=lambda step: (math.isnan(known[step]), sign * known[step], -step))
        return {*ranked[: self.count], *(step for step in steps if step > max(known, default=-1))}


@dataclass(frozen=True, slots=True)
class LowDisk:
    """What to do when fewer bytes than these are free."""

    below: int
    then: Literal["warn", "thin_out", "stop"]


@checked_fields
@dataclass(frozen=True, slots=True, repr=False)
class Retention:
    """The steps that are kept, joined by ``|``.

    Made by ``latest``, ``multiples_of``, ``best``, ``newer_than``, ``keep_if`` and ``low_disk``.

    Attributes:
        newest: This many of the newest steps are kept.
        multiples: Every multiple of any of these is kept, step 0 too.
        bests: The best steps by each of these metrics are kept.
        newer_secs: What was saved within so many seconds is kept.
        conditions: A step for which any of these is true is kept.
        low_disks: What is done when little is free. With nothing else, all steps are kept.
    """

    newest: StepNumber = 0
    multiples: frozenset[Count] = frozenset()
    bests: frozenset[Best] = frozenset()
    newer_secs: NotNegative = 0.0
    conditions: frozenset[Callable[[int], bool]] = frozenset()
    low_disks: frozenset[LowDisk] = frozenset()

    def keep(self, steps: Sequence[int], directory: Path | None = None) -> set[int]:
        """Return the steps to keep among ``steps``, all committed, in any order.

        Args:
            steps: The steps to choose among.
            directory: Where they are: their metrics and times are looked up there, if they matter.
        """
        if self == Retention(low_disks=self.low_disks) and self.low_disks:
            return set(steps)
        kept = self.milestones(steps, directory) | set(sorted(set(steps), reverse=True)[: self.newest])
        if self.newer_secs:
            kept |= {step for step in steps if age_of(directory, step) < self.newer_secs}
        return kept

    def milestones(self, steps: Sequence[int], directory: Path | None = None) -> set[int]:
        """Return the steps that are kept for what they are, not for how new they are. Arguments as in ``keep``."""
        kept = {step for step in steps if any(step % n == 0 for n in self.multiples)}
        kept |= {step for step in steps if any(condition(step) for condition in self.conditions)}
        if self.bests:
            metrics = read_metrics(directory)
            kept |= {step for one in self.bests for step in one.keep(steps, metrics)}
        return kept

    @staticmethod
    def suggestion(value: object) -> str | None:
        """Return what to write instead of a value that is no policy; None if that is not clear."""
        if isinstance(value, int) and value > 0 and not isinstance(value, bool):
            return f"latest({value})"
        keeps_all = isinstance(value, int | str) and value in (0, -1, "all")
        return "None, which keeps all" if keeps_all else None

    def __or__(self, other: Retention) -> Retention:
        """Keeps what either keeps."""
        if not isinstance(other, Retention):
            return NotImplemented
        return Retention(
            max(self.newest, other.newest),
            self.multiples | other.multiples,
            self.bests | other.bests,
            max(self.newer_secs, other.newer_secs),
            self.conditions | other.conditions,
            self.low_disks | other.low_disks,
        )

    def __bool__(self) -> bool:
        """Raise UsageError: ``and``, ``or`` and ``not`` would take one of two policies and drop the other."""
        raise UsageError(
            f"{self!r} is neither true nor false: join what to keep with |, as in latest(3) | multiples_of(10_000), "
            "which keeps what either keeps; `and` and `or` would drop one of the two. For a policy that may be None, "
            "write `is not None`"
        )

    def __repr__(self) -> str:
        terms = [f"latest({self.newest})"] if self.newest else []
        terms += [f"multiples_of({n})" for n in sorted(self.multiples)]
        terms += sorted(f"best({one.metric!r}, keep={one.count}, mode={one.mode!r})" for one in self.bests)
        terms += [f"newer_than(hours={self.newer_secs / 3600:g})"] if self.newer_secs else []
        terms += sorted(f"keep_if({getattr(one, '__qualname__', one)})" for one in self.conditions)
        terms += sorted(f'low_disk("{one.below}", "{one.then}")' for one in self.low_disks)
        return " | ".join(terms) or "Retention()"


def steps_to_remove(
    policy: Retention | None, steps: Iterable[int], held: Collection[int] = (), directory: Path | None = None
) -> list[int]:
    """Return the committed ``steps`` that may go, oldest first. None as ``policy`` keeps everything.

    Never the newest, whatever the policy says, and never one of ``held``: steps that something still reads.

    Args:
        policy: What to keep.
        steps: The committed steps, in any order.
        held: Steps that stay, whatever the policy says.
        directory: Where they are.
    """
    committed = sorted(set(steps))
    if policy is None or not committed:
        return []
    needs_more = bool(policy.bests or policy.newer_secs)  # a user's own class may take steps alone
    kept = policy.keep(committed, directory) if needs_more else policy.keep(committed)
    kept = kept | set(held) | {committed[-1]}
    return [step for step in committed if step not in kept]


def read_metrics(directory: Path | None) -> dict[int, dict[str, float]]:
    """The metrics by step; the last value of a step counts. Lines cut off by a kill are passed over. Raises OSError."""
    found: dict[int, dict[str, float]] = defaultdict(dict)
    if directory is not None:
        for line in lines_of(directory / METRICS_FILE):
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                values = json.loads(line)
                step = int(values.pop("step"))
                found[step] |= {name: float(value) for name, value in values.items()}
    return dict(found)


def age_of(directory: Path | None, step: int) -> float:
    """Return the seconds since a step's directory was written; 0 if it cannot be told, so that it stays."""
    try:
        if directory is None:
            return 0.0
        place = directory / step_name(step)
        if isinstance(place, RemotePath):  # where only objects have times
            place /= METADATA_FILE if (place / METADATA_FILE).is_file() else PROVENANCE_FILE
        return time.time() - place.stat().st_mtime
    except OSError:
        return 0.0
