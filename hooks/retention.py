"""Which committed checkpoints stay: ``latest(3) | multiples_of(10_000)``."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from shardsmith.errors import UsageError


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

    def __or__(self, other: Retention) -> Retention:
        """Keeps what either keeps."""
        if not isinstance(other, Retention):
            return NotImplemented
        return Retention(max(self.newest, other.newest), self.multiples | other.multiples)

    def __repr__(self) -> str:
        terms = [f"latest({self.newest})"] if self.newest else []
        terms += [f"multiples_of({n})" for n in sorted(self.multiples)]
        return " | ".join(terms) or "Retention()"


def latest(count: int) -> Retention:
    """Keeps the ``count`` newest checkpoints."""
    return Retention(newest=_positive("latest", count))


def multiples_of(steps: int) -> Retention:
    """Keeps each checkpoint whose step is a multiple of ``steps``: the milestones that rotation spares."""
    return Retention(multiples=frozenset([_positive("multiples_of", steps)]))


def steps_to_remove(policy: Retention | None, steps: Iterable[int], held: Collection[int] = ()) -> list[int]:
    """The committed ``steps`` that may go, oldest first. None as ``policy`` keeps everything.

    Never the newest, whatever the policy says, and never one of ``held``: steps that something still reads.
    """
    committed = sorted(set(steps))
    if policy is None or not committed:
        return []
    kept = policy.keep(committed) | set(held) | {committed[-1]}
    return [step for step in committed if step not in kept]


def _positive(function: str, number: int) -> int:
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise UsageError(f"{function}({number!r}): give a whole number from 1 on; None as the policy keeps everything")
    return number
