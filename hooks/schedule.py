"""When something happens: ``every(500) | minutes(30) | last()``.

A schedule is a value: it can be printed, compared and shared. It holds no counter and does not know a run's length.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path

from shardsmith.checking.arguments import checked, checked_fields
from shardsmith.checking.types import Count, LocalPath, Positive, StepNumber
from shardsmith.errors import UsageError

from .occasions import FileAppeared, Minutes, Occasion, SignalCame


@checked_fields
@dataclass(frozen=True, slots=True, repr=False)
class Schedule:
    """The steps at which something is due, joined by ``|``.

    Made by ``every``, ``at``, ``last``, ``minutes``, ``at_signal`` and ``at_file``.

    Attributes:
        periods: Due at every positive multiple of any of these.
        steps: Due at each of these.
        at_last: Due at the last step of the run.
        occasions: Due at the first step after each of these has come: ``Hooks`` watches for them, and all ranks act
            after the same step.
    """

    periods: frozenset[Count] = frozenset()
    steps: frozenset[StepNumber] = frozenset()
    at_last: bool = False
    occasions: frozenset[Occasion] = frozenset()

    def due(self, step: int, *, last: bool = False) -> bool:
        """Return whether it is time by the step's number. ``last`` says that ``step`` is the last one of the run."""
        if (last and self.at_last) or step in self.steps:
            return True
        return step > 0 and any(step % period == 0 for period in self.periods)

    def outside(self, other: Schedule) -> Schedule | None:
        """Return those of its terms that have steps at which ``other`` is not due; None if there are none."""
        # Each multiple of a period is one of every divisor of it.
        periods = [period for period in self.periods if not any(period % other_one == 0 for other_one in other.periods)]
        steps = [step for step in self.steps if not other.due(step)]
        at_last, occasions = self.at_last and not other.at_last, self.occasions - other.occasions
        rest = Schedule(frozenset(periods), frozenset(steps), at_last, occasions)
        return None if rest == Schedule() else rest

    @staticmethod
    def suggestion(value: object) -> str | None:
        """Return what to write instead of a value that is no schedule; None if that is not clear."""
        if isinstance(value, int) and value > 0 and not isinstance(value, bool):
            return f"every({value})"
        if isinstance(value, list | tuple | set) and value and all(isinstance(one, int) and one > 0 for one in value):
            return f"at({', '.join(map(str, sorted(value)))})"
        name = value if isinstance(value, str) else getattr(value, "__name__", None)
        words = {"last": "last()", "every": "every(500)", "at": "at(100, 250)", "minutes": "minutes(30)"}
        return words.get(str(name))

    def __or__(self, other: Schedule) -> Schedule:
        """Due whenever either is."""
        if not isinstance(other, Schedule):
            return NotImplemented
        return Schedule(
            self.periods | other.periods,
            self.steps | other.steps,
            self.at_last or other.at_last,
            self.occasions | other.occasions,
        )

    def __bool__(self) -> bool:
        """Raise UsageError: ``and``, ``or`` and ``not`` would take one of two schedules and drop the other."""
        raise UsageError(
            f"{self!r} is neither true nor false: join schedules with |, as in every(500) | last(), which is due "
            "whenever either is; `and` and `or` would drop one of the two. For a schedule that may be None, write "
            "`is not None`"
        )

    def __repr__(self) -> str:
        terms = [f"every({period})" for period in sorted(self.periods)]
        if self.steps:
            terms.append(f"at({', '.join(map(str, sorted(self.steps)))})")
        terms += sorted(repr(occasion) for occasion in self.occasions)
        if self.at_last:
            terms.append("last()")
        return " | ".join(terms) or "Schedule()"


@checked
def every(steps: Count) -> Schedule:
    """Due at ``steps``, ``2 * steps``, ...; not at step 0, where nothing has been trained yet."""
    return Schedule(periods=frozenset([steps]))


@checked
def at(*steps: Count) -> Schedule:
    """Due at each of these steps, counted from 1."""
    if not steps:
        raise UsageError("at() names no step: give at least one, as in at(100, 250)")
    return Schedule(steps=frozenset(steps))


def last() -> Schedule:
    """Due at the last step of the run."""
    return Schedule(at_last=True)


@checked
def minutes(count: Positive) -> Schedule:
    """Due at the first step after every ``count`` minutes, on the clock of rank 0; on all ranks after the same step."""
    return Schedule(occasions=frozenset([Minutes(count)]))


@checked
def at_signal(which: signal.Signals = signal.SIGUSR1) -> Schedule:
    """Due at the next step after a signal to any rank, such as ``kill -USR1``: "save now", and the run goes on.

    ``Hooks`` handles the signal from when it is made on, on the main thread, until ``close``.
    """
    return Schedule(occasions=frozenset([SignalCame(which)]))


@checked
def at_file(path: LocalPath) -> Schedule:
    """Due at the next step after a file appears, as by ``touch run/save-now``.

    Args:
        path: On a file system that rank 0 sees. It looks once a second, and deletes the file.
    """
    return Schedule(occasions=frozenset([FileAppeared(Path(path).absolute())]))
