"""Acting together with other ranks, or alone in the same words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

T = TypeVar("T")


class Team(Protocol):
    """What ``Ranks`` is to a job that divides its work."""

    rank: int
    size: int

    def gather(self, phase: str, body: Callable[[], T]) -> list[T]:
        """Return all values on rank 0, in rank order; elsewhere nothing."""
        ...

    def lead(self, phase: str, body: Callable[[], T]) -> T:
        """Return what rank 0 alone makes of it, on every rank."""
        ...


class Alone:
    """A team of one, which needs no ``torch.distributed`` and does not import it. Errors come as they are."""

    rank = 0
    size = 1

    def gather(self, phase: str, body: Callable[[], T]) -> list[T]:  # noqa: ARG002
        """As ``Team.gather``."""
        return [body()]

    def lead(self, phase: str, body: Callable[[], T]) -> T:  # noqa: ARG002
        """As ``Team.lead``."""
        return body()
