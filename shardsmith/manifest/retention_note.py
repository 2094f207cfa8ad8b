"""What a run writes down of its policy, so that others can say which steps go next: ``.retention.json``."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from shardsmith.errors import ShardsmithError
from shardsmith.ground.bounded import read_bounded
from shardsmith.ground.commit import withdraw_file, write_file, writing
from shardsmith.ground.layout import METADATA_FILE, PROVENANCE_FILE, RETENTION_FILE, new_attempt_id, temporary_path
from shardsmith.ground.remote_path import RemotePath
from shardsmith.manifest.retention import Best, LowDisk, Retention, age_of, read_metrics

_MOST_BYTES = 1 << 20
_OWN_CLASS = "a class of the program"


@dataclass(frozen=True, slots=True)
class NotedPolicy:
    """What a note says."""

    text: str
    """The policy as it is written in the program."""
    marker: Literal["metadata.json", "shardsmith.json"]
    """The file that every step has which the policy counts."""
    known: Retention | None
    """The policy without its ``keep_if``; None where a class of the program decides."""
    conditions: tuple[str, ...]
    """Names of the functions of ``keep_if``. Only the program can ask them."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What becomes of the steps of a folder when the next one is saved, as far as it is known before."""

    removed: tuple[int, ...]
    """These go, whatever the next step is."""
    undecided: dict[int, str]
    """These stay or go, and by what: a metric, a clock, a function of the program, the room on the disk."""


def note_policy(directory: Path, policy: Retention | None, marker: str) -> bool:
    """Let the note beside the steps say what the policy is; without a policy there is none. Rank 0.

    Returns:
        Whether it does so now. Where there is no folder yet, nothing is written.

    Raises:
        WriteError, StorageError: the note is what it was.
    """
    note = directory / RETENTION_FILE
    if not isinstance(note, RemotePath) and not directory.is_dir():
        return False
    if policy is None:
        withdraw_file(note)
        return True
    text = json.dumps(_fields(policy, marker), indent=1, allow_nan=False).encode()
    # Unchanged, as at most resumes: nothing is written.
    with contextlib.suppress(OSError, ValueError):
        if read_bounded(note, _MOST_BYTES) == text:
            return True
    _replace(note, text)
    return True


def read_policy(directory: Path) -> NotedPolicy | None:
    """Return what the note in a folder says; None if there is none, or none that can be understood."""
    try:
        found = json.loads(read_bounded(directory / RETENTION_FILE, _MOST_BYTES))
        if found["schema_version"] != 1 or found["marker"] not in (METADATA_FILE, PROVENANCE_FILE):
            return None
        return NotedPolicy(
            text=str(found["policy"]),
            marker=found["marker"],
            known=_known(found["terms"]) if found["terms"] is not None else None,
            conditions=tuple(map(str, found["conditions"])),
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError, ShardsmithError):
        return None


def expected_removals(noted: NotedPolicy, steps: Collection[int], directory: Path, room: int | None) -> Expected:
    """Return what becomes of the committed steps of a folder when another one is saved.

    Args:
        noted: The policy.
        steps: The committed steps.
        directory: Where they are: metrics and times are looked up there.
        room: Bytes that are free, less what the next step takes; None: not known.
    """
    if not steps:
        return Expected((), {})
    reasons = {step: list(_reasons(noted, step, steps, directory, room)) for step in sorted(steps)}
    removed = tuple(step for step, found in reasons.items() if not found)
    undecided = {step: ", ".join(map(str, found)) for step, found in reasons.items() if found and None not in found}
    return Expected(removed, undecided)


def _reasons(
    noted: NotedPolicy, step: int, steps: Collection[int], directory: Path, room: int | None
) -> Iterator[str | None]:
    """What may keep a step, in words; None: it stays for certain. Nothing: it goes."""
    policy = noted.known
    if policy is None:
        yield noted.text
        return
    # As if the next step were there: it counts as one of the newest and pushes an older one out.
    upcoming = [*steps, max(steps) + 1]
    # A policy of low_disk alone keeps all steps until the disk is short.
    if policy == Retention(low_disks=policy.low_disks) and policy.low_disks and not noted.conditions:
        yield _short_of_room(policy, room)
        return
    certain = Retention(multiples=policy.multiples)
    if step in certain.keep(upcoming):
        yield None
    if step in Retention(newest=policy.newest).keep(upcoming):
        yield _short_of_room(policy, room)
    if policy.newer_secs and (left := policy.newer_secs - age_of(directory, step)) > 0:
        yield f"{Retention(newer_secs=policy.newer_secs)} for {left / 3600:.1f} hours more"
    metrics = read_metrics(directory) if policy.bests else {}
    for one in policy.bests:
        # Without a value yet, the metric may still make this step one of the best.
        if step in one.keep(upcoming, metrics) or one.metric not in metrics.get(step, {}):  # which may still come
            yield repr(Retention(bests=frozenset([one])))
    yield from (f"keep_if({name})" for name in noted.conditions)


def _short_of_room(policy: Retention, room: int | None) -> str | None:
    """Which ``low_disk`` may remove what is kept for being new; None if there is room enough for each."""
    short = [rule for rule in policy.low_disks if rule.then == "thin_out" and room is not None and room < rule.below]
    return repr(Retention(low_disks=frozenset(short))) if short else None


def _replace(note: Path, text: bytes) -> None:
    """All at once, so that a reader finds the old or the new one."""
    if isinstance(note, RemotePath):
        note.store.put(note.key, text)
        return
    temporary = temporary_path(note, new_attempt_id())
    with contextlib.ExitStack() as on_error, writing(note, "writing down what is kept"):
        # After the rename there is nothing left to unlink: the callback then does nothing.
        on_error.callback(temporary.unlink, missing_ok=True)
        write_file(temporary, text)
        temporary.replace(note)


def _fields(policy: Retention, marker: str) -> dict[str, Any]:
    is_own = type(policy) is not Retention
    names = sorted(getattr(one, "__qualname__", str(one)) for one in policy.conditions)
    terms = {
        "newest": policy.newest,
        "multiples": sorted(policy.multiples),
        "bests": sorted([one.metric, one.count, one.mode] for one in policy.bests),
        "newer_secs": policy.newer_secs,
        "low_disks": sorted([one.below, one.then] for one in policy.low_disks),
    }
    return {
        "schema_version": 1,
        "policy": f"{_OWN_CLASS}, {type(policy).__name__}" if is_own else repr(policy),
        "marker": marker,
        "terms": None if is_own else terms,
        "conditions": [] if is_own else names,
    }


def _known(terms: dict[str, Any]) -> Retention:
    return Retention(
        newest=terms["newest"],
        multiples=frozenset(terms["multiples"]),
        bests=frozenset(Best(metric, count, mode) for metric, count, mode in terms["bests"]),
        newer_secs=terms["newer_secs"],
        low_disks=frozenset(LowDisk(below, then) for below, then in terms["low_disks"]),
    )
