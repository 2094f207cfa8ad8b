"""Directories of plain files in an object store, such as exports: every file under its final name, one of them last.

    run/hf/step-500/model.safetensors                  put first, by the ranks that write them
    run/hf/step-500/config.json
    run/hf/step-500/shardsmith.json                    put last and only if there is none: now the directory exists
    run/hf/step-500/.export-3f0c....claim              while it is made or deleted: which process does it
    run/hf/step-500/shardsmith.damaged-3f0c....json    the mark of one that was found damaged

Loaders want the names of a Hugging Face directory, so attempts cannot be kept apart by their names. Instead, each
claims the directory. The later of two claims counts: it deletes what the earlier one has put, and whoever finds its own
claim gone puts nothing more. So a run that starts again need not know whether the former one is dead.

Nothing here communicates: rank 0 calls it, but for ``require_claim``.
"""

from __future__ import annotations

import contextlib
import logging
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Self

from shardsmith.errors import IncompleteCheckpointError, StorageError, TargetExistsError
from shardsmith.ground import layout
from shardsmith.ground.new_file import new_file
from shardsmith.ground.object_store import PART_BYTES, StoredObject
from shardsmith.ground.remote_owner import ABANDONED_AFTER, owner_lives, put_owner
from shardsmith.ground.remote_path import RemotePath
from shardsmith.ground.unfinished_uploads import abort_uploads

log = logging.getLogger(__name__)

_CLAIM = re.compile(r"\.export-(?P<attempt>[0-9a-f]{16})\.claim")
_ASIDE = re.compile(r"shardsmith\.damaged-[0-9a-f]{16}\.json")
_MARKS = frozenset({layout.PROVENANCE_FILE, layout.METADATA_FILE})
"""Of an export, and of a checkpoint."""
_alive: set[str] = set()


class _Claimed:
    """A directory in an object store that this process has claimed. It exists once its mark has been put.

    Attributes:
        id: Random id of 16 hexadecimal digits.
        target: Where it is to be.
    """

    mark: str

    def __init__(self, target: RemotePath) -> None:
        """Claim the target, and delete what former claims have put there.

        Raises:
            TargetExistsError: it is there already, or something else is; or another process has claimed it at the same
                moment.
            StorageError: the store cannot be written to.
        """
        self.id = layout.new_attempt_id()
        self.target = target
        # Before the claim is there: by it alone a sweep of another thread would take this for a dead one.
        _alive.add(self.id)
        try:
            _claim_target(target, self.id)
        except BaseException:
            _alive.discard(self.id)
            raise

    def _publish(self, files: Mapping[str, int], content: bytes) -> Path:
        # Last before the mark: a later claim may have come while the files were put.
        require_claim(self.target, self.id)
        self._check_listing(files)
        mark = self.target / self.mark
        try:
            mark.store.put_new(mark.key, content)
        except FileExistsError as error:
            raise TargetExistsError(self.target, "was made by another process meanwhile") from error
        with contextlib.suppress(StorageError):  # a sweep does it
            mark.store.delete([_claim_of(self.target, self.id).key])
        self._release()
        return self.target

    def abandon(self) -> None:
        """Delete what was put so far. Never raises. The claim stays: what another rank still puts, a sweep deletes."""
        with contextlib.suppress(StorageError, TargetExistsError):
            # Nothing is deleted where a later claim counts: what lies there now is that one's.
            require_claim(self.target, self.id)
            found = self.target.store.objects(self.target.key)
            self.target.store.delete([one.key for one in found if not _CLAIM.fullmatch(PurePosixPath(one.key).name)])
        self._release()

    def _release(self) -> None:
        _alive.discard(self.id)

    def _check_listing(self, files: Mapping[str, int]) -> None:
        found = self.target.objects_below()
        found.pop(_claim_of(self.target, self.id).name, None)
        wanted = {name: size for name, size in files.items() if name != self.mark}
        names = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        if names:
            lines = "\n  ".join(f"{name}: {found.get(name)} bytes, expected {wanted.get(name)}" for name in names)
            message = f"does not hold what was written to it; not committed\n  {lines}"
            raise IncompleteCheckpointError(self.target, message)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        """Abandon it unless it was committed."""
        if self.id in _alive:
            self.abandon()


class RemoteDirectory(_Claimed):
    """An export being put into an object store: a directory whose mark is ``shardsmith.json``.

    Attributes:
        directory: A folder of this machine, deleted in the end, for what is to lie in it beside the files that ranks
            put themselves. It holds those, too, as sparse files of the right size, so that it can be checked.
        put: Names of the files that ranks put themselves.
    """

    mark = layout.PROVENANCE_FILE

    def __init__(self, target: RemotePath) -> None:
        """As the class that it extends."""
        super().__init__(target)
        self.put: set[str] = set()
        self._scratch = tempfile.TemporaryDirectory(prefix="shardsmith-", ignore_cleanup_errors=True)
        self.directory = Path(self._scratch.name)

    def commit(self, files: Mapping[str, int]) -> Path:
        """Put what ranks have not put, then ``shardsmith.json``, with which the directory exists; return that.

        Args:
            files: Every file it must hold, by name, with its size in bytes.

        Raises:
            IncompleteCheckpointError: it holds something else. There is no such directory.
            TargetExistsError: another process has claimed it meanwhile.
            StorageError: the store did not take a file.
        """
        for name in sorted(files.keys() - self.put - {self.mark}):
            put_file(self.directory / name, ClaimedDirectory.of(self.target, self.id) / name)
        return self._publish(files, (self.directory / self.mark).read_bytes())

    def _release(self) -> None:
        super()._release()
        self._scratch.cleanup()


class RemoteCheckpoint(_Claimed):
    """A checkpoint that is no step of a run, being put into an object store under its files' own names.

    Attributes:
        directory: Where every rank puts its files.
    """

    mark = layout.METADATA_FILE

    def __init__(self, target: RemotePath) -> None:
        """As the class that it extends."""
        super().__init__(target)
        self.directory = ClaimedDirectory.of(target, self.id)
        self._manifest = b""

    def write(self, name: str, content: bytes) -> int:
        """Put a file; its size in bytes. The manifest waits for ``commit``. Raises StorageError."""
        if name == self.mark:
            self._manifest = content
        else:
            file = self.target / name
            file.store.put(file.key, content)
        return len(content)

    def commit(self, files: Mapping[str, int]) -> Path:
        """Put the manifest, with which the checkpoint exists; return that. Args and errors as ``RemoteDirectory``."""
        return self._publish(files, self._manifest)


class ClaimedDirectory(RemotePath):
    """A directory in a store that an attempt of this run has claimed, for the ranks that put files into it."""

    attempt = ""

    @classmethod
    def of(cls, target: RemotePath, attempt: str) -> Self:
        """Return the path of the target, with the attempt that has claimed it."""
        path = cls(*target.parts)
        path.attempt = attempt
        return path

    @property
    def located(self) -> RemotePath:
        """Itself: its files, too, lie under their own names, and no manifest need be asked where."""
        return self


def is_claim(name: str) -> bool:
    """Return whether an object says which process makes a directory; beside one that is complete it means nothing."""
    return _CLAIM.fullmatch(name) is not None


def put_file(file: Path, target: RemotePath) -> None:
    """Put a file of this machine into a store. Raises OSError, StorageError; then there is no object."""
    upload = new_file(target, file.stat().st_size)
    with contextlib.closing(upload), file.open("rb") as content:
        while block := content.read(PART_BYTES):
            upload.write(memoryview(block))
        upload.finish()


def require_claim(target: RemotePath, attempt: str) -> None:
    """Raise TargetExistsError if the claim is gone: another process makes this directory now. Any rank."""
    claim = _claim_of(target, attempt)
    try:
        claim.store.head(claim.key)
    except FileNotFoundError:
        raise TargetExistsError(
            target,
            "is being made by another process, which has claimed it later; two runs must not export to one place",
        ) from None


def remove(target: RemotePath) -> bool:
    """Delete a directory: ``shardsmith.json`` first, so that it is never seen half deleted. False if there is none.

    Raises:
        StorageError: it is there still, or files are left, which a sweep deletes later.
    """
    mark = target / layout.PROVENANCE_FILE
    if not mark.is_file():
        return False
    # Before the mark goes, and deleted last: by the claim a sweep tells that this deletion did not finish.
    claim = _claim_of(target, layout.new_attempt_id())
    put_owner(claim)
    mark.store.delete([mark.key])
    target.store.delete([one.key for one in target.store.objects(target.key) if one.key != claim.key])
    target.store.delete([claim.key])
    return True


def set_aside(target: RemotePath) -> RemotePath:
    """Give ``shardsmith.json`` another name, so that the directory counts no more; where that is now.

    Its files stay until the directory is made again.

    Raises:
        FileNotFoundError, StorageError: it is as it was.
    """
    mark = target / layout.PROVENANCE_FILE
    aside = target / f"shardsmith.damaged-{layout.new_attempt_id()}.json"
    # First under the new name: a kill between the two leaves the mark, and the directory counts as before.
    aside.store.put(aside.key, mark.store.get(mark.key))
    mark.store.delete([mark.key])
    return aside


def sweep(parent: RemotePath, listed: Iterable[StoredObject]) -> list[RemotePath]:
    """Delete what dead attempts and deletions left in the directories below a place; what was deleted.

    Args:
        parent: The place.
        listed: All objects below it.
    """
    swept = []
    for name, objects in _directories_in(parent, listed).items():
        claims = _claims_in(objects)
        if not claims or not all(_is_dead(parent / name, claim["attempt"], objects) for claim in claims):
            continue
        if not any((parent / name / mark).is_file() for mark in _MARKS):
            log.info("removing %s, left by an attempt that did not finish", parent / name)
            swept.append(parent / name)
            abort_uploads(parent / name)
            parent.store.delete([one.key for rest, one in objects.items() if not _CLAIM.fullmatch(rest)])
        parent.store.delete([objects[claim[0]].key for claim in claims])
    return swept


def find_unfinished(
    parent: RemotePath, listed: Iterable[StoredObject]
) -> Iterator[tuple[RemotePath, list[StoredObject]]]:
    """Yield directories that are claimed and not there yet, and what was put into them. As ``sweep``."""
    for name, objects in _directories_in(parent, listed).items():
        if _claims_in(objects) and not _MARKS & objects.keys():
            yield parent / name, [*objects.values()]


def _directories_in(parent: RemotePath, listed: Iterable[StoredObject]) -> dict[str, dict[str, StoredObject]]:
    """By name of an export, and of what lies in it."""
    directories: dict[str, dict[str, StoredObject]] = defaultdict(dict)
    prefix = f"{parent.key}/" if parent.key else ""
    for one in listed:
        name, _, rest = one.key.removeprefix(prefix).partition("/")
        if rest:
            directories[name][rest] = one
    return directories


def _claims_in(objects: Iterable[str]) -> list[re.Match[str]]:
    return [found for one in objects if (found := _CLAIM.fullmatch(one))]


def _claim_target(target: RemotePath, attempt: str) -> None:
    claim, before = _claim_of(target, attempt), target.objects_below()
    former = [name for name in before if _CLAIM.fullmatch(name)]
    # Files without a former claim or mark of ours are a stranger's, and are never deleted.
    is_ours = not before or former or any(_ASIDE.fullmatch(name) for name in before)
    if _MARKS & before.keys() or not is_ours:
        raise TargetExistsError(target, "exists already and was left as it is; remove it or choose another name")
    put_owner(claim)
    if former:
        abort_uploads(target)
    # Former claims first: whoever looks for its own before it puts a file must find it gone.
    target.store.delete([f"{target.key}/{name}" for name in [*former, *(before.keys() - {*former})]])
    for other in (found["attempt"] for name in target.objects_below() if (found := _CLAIM.fullmatch(name))):
        if other > attempt:
            target.store.delete([claim.key])
            raise TargetExistsError(target, "has been claimed by another process at the same moment")
        if other < attempt:
            target.store.delete([_claim_of(target, other).key])


def _claim_of(target: RemotePath, attempt: str) -> RemotePath:
    return target / f".export-{attempt}.claim"


def _is_dead(target: RemotePath, attempt: str, objects: Mapping[str, StoredObject]) -> bool:
    if attempt in _alive:
        return False
    if (lives := owner_lives(_claim_of(target, attempt))) is not None:
        return not lives
    return datetime.now(UTC) - max(one.modified for one in objects.values()) > ABANDONED_AFTER
