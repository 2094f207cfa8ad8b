"""The rule of ``commit`` on an object store, which renames nothing: files first, the manifest last, and that once only.

``remote_path`` says what lies where. Beside it, while an attempt is under way and after one that died:

    run/step-500/.3f0c....owner                    which process makes it
    run/step-500/metadata.damaged-3f0c....json     the manifest of a step that was set aside

Nothing here communicates: rank 0 calls it.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Literal, Self

from shardsmith.errors import IncompleteCheckpointError, StorageError, TargetExistsError
from shardsmith.ground import layout, remote_export
from shardsmith.ground.object_store import StoredObject
from shardsmith.ground.remote_owner import ABANDONED_AFTER, owner_lives, put_owner, this_process
from shardsmith.ground.remote_path import RemotePath, as_path
from shardsmith.ground.unfinished_uploads import abort_uploads

log = logging.getLogger(__name__)

_OWNER = re.compile(r"\.(?P<attempt>[0-9a-f]{16})\.owner")
_ASIDE = re.compile(r"metadata\.(?P<kind>damaged|superseded)-(?P<attempt>[0-9a-f]{16})\.json")
_PROBE = re.compile(r"\.probe-(?P<id>[0-9a-f]{16})")
_ATTEMPT = re.compile(r"[0-9a-f]{16}")
_alive: set[str] = set()

RemainsKind = Literal["unfinished", "damaged", "superseded"]
"""What was left of an attempt, or set aside by a resume."""


class RemoteAttempt:
    """A step being put into an object store. It exists once ``commit`` has put its manifest.

    Attributes:
        id: Random id of 16 hexadecimal digits.
        target: The step.
        directory: Below which its files are put.
    """

    def __init__(self, target: RemotePath, attempt_id: str | None = None) -> None:
        """Say in the store which process makes it.

        Raises:
            TargetExistsError: the step is there already.
            StorageError: the store cannot be written to.
        """
        self.id = attempt_id or layout.new_attempt_id()
        self.target = target
        self.directory = target / self.id
        self._manifest: bytes | None = None
        # The store decides at `commit`; this only says it before the files are put.
        refuse_existing(target)
        # Before the owner is there: by it alone a sweep of another thread would take the attempt for a dead one.
        _alive.add(self.id)
        try:
            put_owner(self._owner)
        except BaseException:
            self._release()
            raise

    def write(self, name: str, content: bytes) -> int:
        """Put a file; its size in bytes. The manifest waits for ``commit``. Raises StorageError."""
        if name == layout.METADATA_FILE:
            # Kept until `commit`: the step counts from the manifest on.
            self._manifest = content
        else:
            file = self.directory / name
            file.store.put(file.key, content)
        return len(content)

    def commit(self, files: Mapping[str, int]) -> Path:
        """Put the manifest, with which the step exists; return that.

        Args:
            files: Every file it must hold, by name, with its size in bytes.

        Raises:
            IncompleteCheckpointError: it holds something else. There is no such step.
            TargetExistsError: another process has made the step meanwhile.
            StorageError: the store did not take the manifest.
        """
        assert self._manifest is not None, "the manifest is written before"
        self._check_listing(files)
        manifest = self.target / layout.METADATA_FILE
        try:
            manifest.store.put_new(manifest.key, self._manifest)
        except FileExistsError as error:
            raise TargetExistsError(self.target, "was made by another process meanwhile") from error
        # What this process remembers of a step of that name is of an earlier attempt.
        self.target.forget()
        self._release()
        with contextlib.suppress(StorageError):  # a sweep does it
            self._owner.store.delete([self._owner.key])
        return self.target

    def abandon(self) -> None:
        """Delete what was put so far. Never raises. What another rank is still putting goes at the next sweep."""
        with contextlib.suppress(StorageError):
            _delete(self.directory.store.objects(self.directory.key), self.directory)
        self._release()

    def _release(self) -> None:
        _alive.discard(self.id)

    @property
    def _owner(self) -> RemotePath:
        return self.target / f".{self.id}.owner"

    def _check_listing(self, files: Mapping[str, int]) -> None:
        wanted = {name: size for name, size in files.items() if name != layout.METADATA_FILE}
        found = self.directory.sizes()
        if found != wanted:
            problems = [
                f"{name}: {_size(found.get(name))}, expected {_size(wanted.get(name))}"
                for name in sorted(found.keys() | wanted.keys())
                if found.get(name) != wanted.get(name)
            ]
            lines = "\n  ".join(problems)
            message = f"does not hold what was written to it; not committed\n  {lines}"
            raise IncompleteCheckpointError(self.directory, message)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        """Abandon the attempt unless it was committed."""
        if self.id in _alive:
            self.abandon()


def refuse_existing(target: RemotePath) -> None:
    """Raise TargetExistsError if there is such a step. Raises StorageError."""
    if (target / layout.METADATA_FILE).is_file():
        raise TargetExistsError(target, "exists already and was left as it is; remove it or choose another name")


def remove(step: RemotePath) -> bool:
    """Delete a step: its manifest first, so that it is never seen half deleted. False if there is none.

    Raises:
        StorageError: the manifest is there still, or files are left, which a sweep deletes later.
    """
    if remove_set_aside(step):
        return True
    manifest = step / layout.METADATA_FILE
    try:
        attempt = attempt_of(step)
    except FileNotFoundError:
        # No step: it may be an export.
        return remote_export.remove(step)
    if attempt is not None:
        put_owner(step / f".{attempt}.owner")  # by which a sweep tells that the deletion did not finish
    manifest.store.delete([manifest.key])
    step.forget()
    if attempt is not None:
        files = [one.key for one in step.store.objects((step / attempt).key)]
        step.store.delete([*files, f"{step.key}/.{attempt}.owner"])
    return True


def set_aside(step: RemotePath, kind: Literal["damaged", "superseded"]) -> RemotePath:
    """Give the manifest of a step another name, so that it counts no more and can be saved again; where it is now.

    Its files stay, and no sweep deletes them.

    Raises:
        FileNotFoundError, StorageError: it is as it was.
    """
    manifest = step / layout.METADATA_FILE
    if not manifest.is_file():
        return remote_export.set_aside(step)
    data, attempt = manifest.read_all(), attempt_of(step) or layout.new_attempt_id()
    aside = step / f"metadata.{kind}-{attempt}.json"
    # First under the new name: a kill between the two leaves both, and the step counts as before.
    manifest.store.put(f"{step.key}/{aside.name}", data)
    manifest.store.delete([manifest.key])
    step.forget()
    return aside


def sweep(parent: RemotePath) -> list[RemotePath]:
    """Delete what dead attempts left below a run's directory; what was deleted. Raises StorageError.

    An attempt of this host is dead when its process is; of another host, when its last file is a day old.
    """
    swept = []
    listed = parent.store.objects(parent.key)
    # One that is alive is being compared with: without it the store would seem to know no conditional writes.
    _delete([one for one in listed if _is_dead_probe(parent, one)], parent)
    for step, found in _steps_in(parent, listed).items():
        for attempt in found.suspects():
            place = parent / step / attempt
            if not _is_dead(place, found):
                continue
            # The listing may be older than the commit of this attempt: so the manifest is asked before a deletion.
            if attempt_of_any(parent / step) == attempt:
                _delete(found.owner_of(attempt), place)  # of one that died after its commit
            else:
                log.info("removing %s, left by an attempt that did not finish", place)
                abort_uploads(place)  # while its owner is known: a sweep that ends here is done again
                _delete([*found.attempts.get(attempt, ()), *found.owner_of(attempt)], place)
                swept.append(place)
    return [*swept, *remote_export.sweep(parent, listed)]


def find_remains(parent: RemotePath) -> Iterator[tuple[RemotePath, RemainsKind, int]]:
    """Yield what lies below a run's directory and is no committed step: where, of which kind, its size in bytes.

    What an attempt has put that is still under way is ``unfinished``, too. Raises StorageError.
    """
    listed = parent.store.objects(parent.key)
    for step, found in _steps_in(parent, listed).items():
        for attempt in found.suspects():
            if attempt_of_any(parent / step) != attempt:
                objects = [*found.attempts.get(attempt, ()), *found.owner_of(attempt)]
                yield parent / step / attempt, "unfinished", sum(one.size for one in objects)
        for attempt, (name, kind) in sorted(found.aside.items()):
            yield parent / step / name, kind, sum(one.size for one in found.attempts.get(attempt, ()))
    for place, objects in remote_export.find_unfinished(parent, listed):
        yield place, "unfinished", sum(one.size for one in objects)


def remove_set_aside(manifest: RemotePath) -> bool:
    """Delete the files of a step that was set aside, then its renamed manifest. False if it is none.

    Raises:
        StorageError: something is left, with the manifest.
    """
    match = _ASIDE.fullmatch(manifest.name)
    if match is None:
        return False
    files = manifest.store.objects((manifest.parent / match["attempt"]).key)
    # Files first: what remains of them after an error is still named by the manifest.
    manifest.store.delete([one.key for one in files])
    manifest.store.delete([manifest.key])
    return True


def check_writable(directory: RemotePath) -> None:
    """Put an object below a place, try to make it a second time, and delete it: better now than at a save.

    Raises:
        StorageError: one of them was refused, or the second one was not.
    """
    probe_id = layout.new_attempt_id()
    probe = directory / f".probe-{probe_id}"
    _alive.add(probe_id)
    try:
        probe.store.put_new(probe.key, this_process())
        try:
            probe.store.put_new(probe.key, b"second")
        except FileExistsError:
            return
        finally:
            probe.store.delete([probe.key])
    finally:
        _alive.discard(probe_id)
    raise StorageError(
        str(probe),
        "was to be made only if there is none, and the store replaced it: it does not know conditional writes "
        "(If-None-Match: *), by which of two runs that race one alone makes a step. Use a store that knows them, or a "
        "newer version of this one",
    )


def committed_steps(directory: RemotePath, mark: str) -> list[int]:
    """Steps below a place that have such a file, ascending. Raises StorageError."""
    prefix = f"{directory.key}/" if directory.key else ""
    names = (one.key.removeprefix(prefix).split("/") for one in directory.store.objects(directory.key))
    found = (layout.parse_step(name[0]) for name in names if name[1:] == [mark])
    return sorted(step for step in found if step is not None)


def attempt_of(step: RemotePath) -> str | None:
    """Return the attempt that a manifest names, read anew; None if it names none. Raises FileNotFoundError."""
    step.forget()
    # Reading the manifest notes its attempt, from which `located` makes the place of any file.
    (step / layout.METADATA_FILE).read_all()
    place = (step / "any").located.parent
    return place.name if place != step else None


def attempt_of_any(step: RemotePath) -> str | None:
    """As ``attempt_of``; None without a manifest, too."""
    try:
        return attempt_of(step)
    except FileNotFoundError:
        return None


@dataclass
class _Found:
    """What a listing shows of one step."""

    attempts: dict[str, list[StoredObject]] = field(default_factory=lambda: defaultdict(list))
    owners: dict[str, StoredObject] = field(default_factory=dict)
    aside: dict[str, tuple[str, RemainsKind]] = field(default_factory=dict)
    has_manifest: bool = False

    def add(self, names: list[str], one: StoredObject) -> None:
        if _ATTEMPT.fullmatch(names[0]):
            self.attempts[names[0]].append(one)
        elif owner := _OWNER.fullmatch(names[0]):
            self.owners[owner["attempt"]] = one
        elif aside := _ASIDE.fullmatch(names[0]):
            self.aside[aside["attempt"]] = names[0], "damaged" if aside["kind"] == "damaged" else "superseded"
        self.has_manifest |= names == [layout.METADATA_FILE]

    def owner_of(self, attempt: str) -> list[StoredObject]:
        """Return what says which process makes an attempt, if that is there."""
        return [self.owners[attempt]] if attempt in self.owners else []

    def suspects(self) -> list[str]:
        """The attempts of which one listing cannot tell that they are committed, or were."""
        all_of_them = {*self.attempts, *self.owners} - {*self.aside}
        # One attempt, a manifest, and no owner any more: it is the attempt that made the step.
        if self.has_manifest and len(all_of_them) == 1 and not self.owners:
            return []
        return sorted(all_of_them)


def _steps_in(parent: RemotePath, listed: Iterable[StoredObject]) -> dict[str, _Found]:
    steps: dict[str, _Found] = defaultdict(_Found)
    prefix = f"{parent.key}/" if parent.key else ""
    for one in listed:
        step, *names = one.key.removeprefix(prefix).split("/")
        if names and layout.parse_step(step) is not None:
            steps[step].add(names, one)
    return steps


def _is_dead(place: RemotePath, found: _Found) -> bool:
    if place.name in _alive:
        return False
    objects: list[StoredObject] = [*found.attempts.get(place.name, ())]
    if (owner := found.owners.get(place.name)) is not None:
        if (alive := owner_lives(place.parent / f".{place.name}.owner")) is not None:
            return not alive
        objects.append(owner)
    # Of another host nothing more is known than when it has put something last.
    return _is_old(max(one.modified for one in objects))


def _is_dead_probe(parent: RemotePath, one: StoredObject) -> bool:
    """Whether an object is a probe whose process is dead, or of which that cannot be told and which is a day old."""
    match = _PROBE.fullmatch(PurePosixPath(one.key).name)
    if match is None or match["id"] in _alive:
        return False
    owner = as_path(f"{parent.store.url}/{one.key}")
    assert isinstance(owner, RemotePath)
    alive = owner_lives(owner)
    return _is_old(one.modified) if alive is None else not alive


def _is_old(modified: datetime) -> bool:
    return datetime.now(UTC) - modified > ABANDONED_AFTER


def _delete(objects: Iterable[StoredObject], place: RemotePath) -> None:
    place.store.delete([one.key for one in objects])


def _size(nbytes: int | None) -> str:
    return "nothing" if nbytes is None else f"{nbytes} bytes"
