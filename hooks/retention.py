"""Which committed checkpoints stay: ``latest(3) | multiples_of(10_000)``."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from shardsmith.checking.arguments import checked
from shardsmith.checking.types import Count


@dataclass(frozen=True, slots=True, repr=False)
class Retention:
    """The steps that are kept. Made by ``latest`` and ``multiples_of``, joined by ``|``.

    Attributes:
        newest: This many of the newest steps are kept.
        multiples: Every multiple of any of these is kept, step 0 too.
    """

    newest: int = 0
    multiples: frozenset[int] = frozenset()

    def keep(self, steps: Sequence[int]) -> set[int]:
        """The steps to keep among ``steps``, all committed, in any order."""
        newest = sorted(set(steps), reverse=True)[: self.newest]
        return {*newest, *(step for step in steps if any(step % n == 0 for n in self.multiples))}

    @staticmethod
    def suggestion(value: object) -> str | None:
        """What to write for a value that somebody has given for a policy; None if nobody can know."""
        if isinstance(value, int) and value > 0 and not isinstance(value, bool):
            return f"latest({value})"
        return "None, which keeps all" if value in (0, -1, "all") else None

    def __or__(self, other: Retention) -> Retention:
        """Keeps what either keeps."""
        if not isinstance(other, Retention):
            return NotImplemented
        return Retention(max(self.newest, other.newest), self.multiples | other.multiples)

    def __repr__(self) -> str:
        terms = [f"latest({self.newest})"] if self.newest else []
        terms += [f"multiples_of({n})" for n in sorted(self.multiples)]
        return " | ".join(terms) or "Retention()"


@checked
def latest(count: Count) -> Retention:
    """Keeps the ``count`` newest checkpoints."""
    return Retention(newest=count)


@checked
def multiples_of(steps: Count) -> Retention:
    """Keeps each checkpoint whose step is a multiple of ``steps``: the milestones that rotation spares."""
    return Retention(multiples=frozenset([steps]))


def steps_to_remove(policy: Retention | None, steps: Iterable[int], held: Collection[int] = ()) -> list[int]:
    """The committed ``steps`` that may go, oldest first. None as ``policy`` keeps everything.

    Never the newest, whatever the policy says, and never one of ``held``: steps that something still reads.
    """
    committed = sorted(set(steps))
    if policy is None or not committed:
        return []
    kept = policy.keep(committed) | set(held) | {committed[-1]}
    return [step for step in committed if step not in kept]
