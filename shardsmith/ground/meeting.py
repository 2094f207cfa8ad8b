"""Objects that every rank must make: found out at once when a rank makes another one, or none."""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar, cast

from shardsmith.errors import RankError, RanksDisagreeError, RankTimeoutError, UsageError
from shardsmith.ground.ranks import Ranks

log = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., None])

START_SECS = "SHARDSMITH_START_SECS"
"""Environment variable: how long the ranks of a job may be apart when they make the same object, in seconds."""
_START_SECS = 30.0
_WARN_SECS = 3.0
_HERE = (
    "Every rank must get here, {what}, at the same point of the program: look for code that runs on one rank only, "
    "such as `if rank == 0:`."
)


def meet(ranks: Ranks, what: str, facts: Mapping[str, Any]) -> None:
    """Return when all ranks are here with the same facts. All ranks; communicates through the store.

    It waits less long than a save does: a rank that makes no such object never comes. A rank may be late by as long
    as this process has lived, for what has taken one rank a minute may take another two, and at least 30 seconds.

    Args:
        ranks: The ranks that meet.
        what: The moment, for the errors: "making ShardedSave".
        facts: What must be the same on all ranks, fit for JSON.

    Raises:
        RanksDisagreeError: on all ranks, naming every fact that differs.
        RankFailedError: on all ranks: one is at another moment.
        RankTimeoutError: a rank did not come.
    """
    if ranks.size == 1:
        return
    limit = _limit_secs(ranks)
    with _short_wait(ranks, limit), _warning(ranks, what, limit):
        try:
            differences = ranks.agree(what, lambda: dict(facts), _differences)
        except RankTimeoutError as error:
            error.args = (f"{error}. {_HERE.format(what=what)} Where a rank may be slower than that, set {START_SECS}",)
            raise
    if differences:
        lines = "\n  ".join(differences)
        raise RanksDisagreeError(f"{what}: the ranks do not do the same\n  {lines}\nNothing was done.")


def made_together(constructor: F) -> F:
    """Tell the other ranks what a constructor that all of them call raises on this one alone, for its arguments, say.

    They wait for it in ``meet``, and raise at once. The object must keep its first ``Ranks`` as ``_ranks``, and make no
    second one before ``meet``.
    """

    @functools.wraps(constructor)
    def make(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            constructor(self, *args, **kwargs)
        except RankError:  # they know
            raise
        except Exception as error:
            with suppress(RuntimeError):
                # If the constructor has made no `Ranks` yet, this one gets the number, and so the keys,
                # that the others wait for.
                ranks = vars(self).get("_ranks") or Ranks()
                ranks.refuse(f"making {type(self).__name__}", error)
            raise

    return cast(F, make)


@contextmanager
def _short_wait(ranks: Ranks, limit_secs: float) -> Iterator[None]:
    usual, ranks.timeout_secs = ranks.timeout_secs, limit_secs
    try:
        yield
    finally:
        ranks.timeout_secs = usual


@contextmanager
def _warning(ranks: Ranks, what: str, limit_secs: float) -> Iterator[None]:
    """Within it, after some seconds, a warning names the ranks that have not come: once a host, not from each rank."""
    # Rank 1 as well, since rank 0 may be the one that has not come.
    if ranks.rank > 1 and os.environ.get("LOCAL_RANK") != "0":
        yield
        return
    # A thread, since this one waits in the store. With a short limit the warning must come before its end.
    timer = threading.Timer(min(_WARN_SECS, limit_secs / 2), _warn, [ranks, what, limit_secs])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _warn(ranks: Ranks, what: str, limit_secs: float) -> None:
    with suppress(RuntimeError):  # the store is gone; whoever waits is told
        if missing := ranks.missing():
            log.warning("%s: %s, for up to %.0f s. %s", what, _absent(missing), limit_secs, _HERE.format(what=what))


def _absent(missing: Mapping[int, bool]) -> str:
    silent = [str(rank) for rank, was_heard_of in missing.items() if not was_heard_of]
    made_none = f" (no hook that saves or exports was made on rank {_some(silent)} so far)" if silent else ""
    return f"still waiting for rank {_some([*map(str, missing)])}{made_none}"


def _limit_secs(ranks: Ranks) -> float:
    chosen = os.environ.get(START_SECS)
    try:
        return min(ranks.timeout_secs, float(chosen) if chosen else max(_START_SECS, _age_secs()))
    except ValueError:
        raise UsageError(f"{START_SECS}={chosen!r} in the environment: a number of seconds is expected") from None


def _differences(facts: Sequence[Mapping[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for of_rank in facts for name in of_rank)
    lines = []
    for name in names:
        holders: dict[str, list[str]] = {}
        for rank, of_rank in enumerate(facts):
            holders.setdefault(str(of_rank.get(name, "not there")), []).append(str(rank))
        if len(holders) > 1:
            told = [f"{value} on rank {_some(held)}" for value, held in holders.items()]
            lines.append(f"{name}: {'; '.join(told)}")
    return lines


def _some(ranks: Sequence[str]) -> str:
    return ", ".join(ranks[:4]) + " ..." * (len(ranks) > 4)


def _age_secs() -> float:
    """How long this process has lived; 0 where the system does not say."""
    with suppress(OSError, ValueError, AttributeError, IndexError):
        # The program's name, in parentheses, may have blanks: fields count after it. Index 19 is field 22 of proc(5).
        started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        # The clock that field counts by: from the boot, time of suspension included.
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    return 0.0
