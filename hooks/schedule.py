"""When something happens: ``every(500) | at(100, 250) | last()``.

A schedule is a value: it can be printed, compared and shared. It holds no counter and does not know a run's length.
"""

from __future__ import annotations

from dataclasses import dataclass

from shardsmith.checking.arguments import checked
from shardsmith.checking.types import Count
from shardsmith.errors import UsageError


@dataclass(frozen=True, slots=True, repr=False)
class Schedule:
    """The steps at which something is due. Made by ``every``, ``at`` and ``last``, joined by ``|``.

    Attributes:
        periods: Due at every positive multiple of any of these.
        steps: Due at each of these.
        at_last: Due at the last step of the run.
    """

    periods: frozenset[int] = frozenset()
    steps: frozenset[int] = frozenset()
    at_last: bool = False

    def due(self, step: int, *, last: bool = False) -> bool:
        """Whether it is time. ``last`` says that ``step`` is the last one of the run."""
        if (last and self.at_last) or step in self.steps:
            return True
        return step > 0 and any(step % period == 0 for period in self.periods)

    def outside(self, other: Schedule) -> Schedule | None:
        """Those of its terms that have steps at which ``other`` is not due; None if there are none."""
        periods = [period for period in self.periods if not any(period % other_one == 0 for other_one in other.periods)]
        steps = [step for step in self.steps if not other.due(step)]
        rest = Schedule(frozenset(periods), frozenset(steps), self.at_last and not other.at_last)
        return None if rest == Schedule() else rest

    @staticmethod
    def suggestion(value: object) -> str | None:
        """What to write for a value that somebody has given for a schedule; None if nobody can know."""
        if isinstance(value, int) and value > 0 and not isinstance(value, bool):
            return f"every({value})"
        if isinstance(value, list | tuple | set) and value and all(isinstance(one, int) and one > 0 for one in value):
            return f"at({', '.join(map(str, sorted(value)))})"
        name = value if isinstance(value, str) else getattr(value, "__name__", None)
        return {"last": "last()", "every": "every(500)", "at": "at(100, 250)"}.get(str(name))

    def __or__(self, other: Schedule) -> Schedule:
        """Due whenever either is."""
        if not isinstance(other, Schedule):
            return NotImplemented
        return Schedule(self.periods | other.periods, self.steps | other.steps, self.at_last or other.at_last)

    def __repr__(self) -> str:
        terms = [f"every({period})" for period in sorted(self.periods)]
        if self.steps:
            terms.append(f"at({', '.join(map(str, sorted(self.steps)))})")
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
