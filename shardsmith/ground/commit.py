"""The one rule for everything that is written: under a temporary name first, complete and durable, then renamed.

An attempt writes into ``.<name>.tmp-<id>`` beside its target. Its files are fsynced by whoever wrote them; ``commit``
checks that the directory holds exactly what was meant to be there, fsyncs the directories, renames, and fsyncs the
parent. So a name without the temporary mark is complete, also after a power loss, and nothing is written in place.

This is the only module that makes anything visible or deletes it; in an object store ``remote_commit`` does it, by the
same functions. Nothing here communicates: rank 0 calls it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import stat
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

from shardsmith.errors import (
    IncompleteCheckpointError,
    StorageError,
    TargetError,
    TargetExistsError,
    UsageError,
    WriteError,
)
from shardsmith.ground import layout, remote_commit
from shardsmith.ground.leases import unheld
from shardsmith.ground.path_advice import advice_on_writing
from shardsmith.ground.remote_commit import RemoteAttempt
from shardsmith.ground.remote_export import ClaimedDirectory, RemoteCheckpoint
from shardsmith.ground.remote_path import RemotePath

log = logging.getLogger(__name__)

_alive: weakref.WeakSet[Attempt] = weakref.WeakSet()


def begin_attempt(target: Path) -> AnyAttempt:
    """Begin to make a directory, on a disk or in an object store. Raises TargetExistsError, WriteError."""
    if not isinstance(target, RemotePath):
        return Attempt(target)
    with writing(target, "beginning"):
        return RemoteCheckpoint(target) if layout.parse_step(target.name) is None else RemoteAttempt(target)


def attempt_directory(target: Path, attempt_id: str) -> Path:
    """Return where every rank writes the files of an attempt that rank 0 has begun."""
    if not isinstance(target, RemotePath):
        return layout.temporary_path(target, attempt_id)
    is_step = layout.parse_step(target.name) is not None
    return target / attempt_id if is_step else ClaimedDirectory.of(target, attempt_id)


class Attempt:
    """A directory being made. Until ``commit`` it has a temporary name, and it is gone if ``commit`` is never reached.

    While the attempt is alive it holds a lock on its directory, by which ``sweep`` tells it from a dead one.

    Attributes:
        id: Random id of 16 hexadecimal digits.
        target: The final name.
        directory: The temporary directory, where files are written meanwhile.
    """

    def __init__(self, target: Path, attempt_id: str | None = None) -> None:
        """Make the temporary directory, and missing parents of the target.

        Raises:
            TargetExistsError: there is something at the target already.
            WriteError: the directory cannot be made.
        """
        if isinstance(target, RemotePath):
            raise UsageError(f"{target} is in an object store, and this is written to local disks only")
        self.id = attempt_id or layout.new_attempt_id()
        self.target = target
        self.directory = layout.temporary_path(target, self.id)
        refuse_existing(target)
        with writing(self.directory, "making the directory"):
            _make_durably(target.parent)
            self._lock: int | None = None
            while self._lock is None:  # once, unless a sweep looked in between mkdir and lock and took it for dead
                self.directory.mkdir()
                self._lock = _lock(self.directory)
        _alive.add(self)

    def write(self, name: str, content: bytes) -> int:
        """Make a file in it, durable in itself; its size in bytes. Raises WriteError."""
        return write_file(self.directory / name, content)

    def commit(self, files: Mapping[str, int]) -> Path:
        """Make the directory visible under its final name and return that.

        Args:
            files: Every file it must hold, by path relative to it, with its size in bytes. Each was fsynced.

        Raises:
            IncompleteCheckpointError: it holds something else. It is not made visible.
            TargetExistsError: somebody else made the target meanwhile.
            WriteError: fsync or rename failed.
        """
        _check_listing(self.directory, files)
        with writing(self.directory, "fsync of the directory"):
            for folder in {self.directory, *((self.directory / name).parent for name in files)}:
                sync(folder)  # the names of the files, which their own fsync does not make durable
        refuse_existing(self.target)
        with writing(self.target, "rename"):
            try:
                self.directory.rename(self.target)  # atomic: a reader sees nothing or all of it
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise TargetExistsError(self.target, "was made by another process meanwhile") from error
                raise
            try:
                sync(self.target.parent)
            except OSError:  # it might be gone after a power loss, so it must not be seen before one either
                self.target.rename(self.directory)
                raise
        self._release()
        return self.target

    def abandon(self) -> None:
        """Delete what was written so far. Never raises: it runs while another error is on its way."""
        shutil.rmtree(self.directory, ignore_errors=True)  # still locked, so that no sweep deletes it at the same time
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        """Abandon the attempt unless it was committed."""
        if self._lock is not None:
            self.abandon()


AnyAttempt = Attempt | RemoteAttempt | RemoteCheckpoint


def abandon_all() -> None:
    """Delete what the attempts of this process have written so far, for when it is about to end."""
    for attempt in list(_alive):
        if attempt._lock is not None:
            attempt.abandon()


def write_file(path: Path, data: bytes) -> int:
    """Make a new file with this content, durable in itself; its size in bytes.

    Raises:
        WriteError: also if something with that name exists.
    """
    with writing(path, "write"):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    return len(data)


def place_file(path: Path, data: bytes) -> None:
    """Make a new file appear in a directory that is there already, or in a store, durable and all at once.

    Raises TargetExistsError if there is something of that name, and WriteError if it could not be written. On a disk
    it takes the place of a file of that name that another process makes meanwhile.
    """
    if isinstance(path, RemotePath):
        with writing(path, "a new object"):
            path.store.put_new(path.key, data)
        return
    refuse_existing(path)
    temporary = layout.temporary_path(path, layout.new_attempt_id())
    with contextlib.ExitStack() as on_error:
        on_error.callback(temporary.unlink, missing_ok=True)
        write_file(temporary, data)
        with writing(path, "rename"):
            temporary.rename(path)
            on_error.callback(path.unlink)  # it might be gone after a power loss, so it must not be seen before one
            sync(path.parent)
        on_error.pop_all()


def place_link(path: Path, target: str) -> None:
    """Make a link lead to a target, whatever it led to before; it is there all the time. Rank 0.

    Args:
        path: The link; what is there and is no link is left alone.
        target: Relative to the link's directory.

    Raises:
        TargetExistsError: there is something else of that name.
        WriteError: it could not be made.
    """
    if not path.is_symlink():
        refuse_existing(path)
    temporary = layout.temporary_path(path, layout.new_attempt_id())
    with writing(path, "making the link"), contextlib.ExitStack() as on_error:
        on_error.callback(temporary.unlink, missing_ok=True)
        temporary.symlink_to(target)
        temporary.replace(path)
        sync(path.parent)


def withdraw_file(path: Path) -> bool:
    """Delete a file durably; False if there is none. Raises WriteError, StorageError."""
    if isinstance(path, RemotePath):
        there = path.is_file()
        path.store.delete([path.key] if there else [])
        return there
    with writing(path, "deletion"):
        try:
            path.unlink()
        except FileNotFoundError:
            return False
        sync(path.parent)
    return True


def sync(path: Path) -> None:
    """fsync a file, or a directory, also one that a link leads to. Raises OSError."""
    descriptor = os.open(path.resolve() if path.is_dir() else path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(directory: Path, *, nameless: bool = False) -> bool:
    """Delete a committed directory: rename it to trash first, so that it is never visible half-deleted.

    Returns False, and leaves it as it is, while somebody holds it (see ``leases``).

    Args:
        directory: The directory.
        nameless: The trash does not bear its name: for directories of a trainer that takes any name for a checkpoint
            which has the one of a checkpoint in it.

    Raises:
        WriteError: it could not be renamed, or not wholly deleted; then ``sweep`` finishes the job later.
    """
    if isinstance(directory, RemotePath):
        with writing(directory, "deletion"):
            return remote_commit.remove(directory)
    named = directory.with_name(layout.REMOVED) if nameless else directory
    trash = layout.trash_path(named, layout.new_attempt_id())
    with writing(directory, "deletion"), _claim(directory):  # a sweep leaves it alone meanwhile
        with unheld(directory) as free:
            if not free:
                return False
            directory.rename(trash)
        shutil.rmtree(trash)
    return True


def sweep(parent: Path) -> list[Path]:
    """Delete what dead attempts and unfinished deletions of ours left in a directory; what was deleted.

    Attempts whose process is alive hold a lock and are left alone, as is everything that is not named by us.
    """
    if isinstance(parent, RemotePath):
        return [*remote_commit.sweep(parent)]
    swept = []
    for path in sorted(parent.iterdir()) if parent.is_dir() else []:
        if not layout.is_leftover(path.name) or path.is_symlink() or not path.is_dir():
            if layout.is_leftover_file(path.name) and not path.is_dir():
                path.unlink(missing_ok=True)
            continue
        with _claim(path) as dead:
            if dead:
                log.info("removing %s, left by an attempt that did not finish", path)
                shutil.rmtree(path, ignore_errors=True)
        if not path.exists():
            swept.append(path)
    return swept


def check_writable(directory: Path) -> None:
    """Go once through write, fsync, rename and delete in a directory, made if missing: better now than at a save.

    Raises:
        WriteError: one of them fails there.
    """
    if isinstance(directory, RemotePath):
        with writing(directory, "a first object"):
            remote_commit.check_writable(directory)
        return
    with Attempt(directory / f"probe-{layout.new_attempt_id()}") as attempt:  # never visible, and swept if we die here
        write_file(attempt.directory / "probe", b"probe")
        with writing(attempt.directory, "fsync of the directory"):
            sync(attempt.directory)
        remove(attempt.directory)


def require_space(directory: Path, nbytes: int) -> None:
    """Raise WriteError if the file system has no room for so many bytes: better now than when most is written.

    Not by reserving it: some file systems do that by writing it all, and tmpfs by clearing it.
    """
    with writing(directory, f"making room for {nbytes} bytes"):
        space = os.statvfs(directory)
        if space.f_blocks and space.f_bavail * space.f_frsize < nbytes:  # without blocks it does not say
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def refuse_existing(target: Path) -> None:
    """Raise TargetExistsError if there is anything at ``target``, a dangling link included.

    In a store only what is complete counts: who claims the place there looks for the rest.
    """
    if isinstance(target, RemotePath):
        there = (target / layout.PROVENANCE_FILE).is_file() or (target / layout.METADATA_FILE).is_file()
    else:
        there = os.path.lexists(target)
    if there:
        raise TargetExistsError(target, "exists already and was left as it is; remove it or choose another name")


@contextlib.contextmanager
def writing(path: Path, phase: str) -> Iterator[None]:
    """Turn an OSError of the body into a WriteError that says what was being done, where, and the free space."""
    try:
        yield
    except StorageError as error:
        told = str(error).removeprefix(f"{path}: ")
        raise WriteError(errno.EIO, f"{path}: {phase} failed: {told}") from error
    except (TargetError, WriteError):
        raise
    except OSError as error:
        raise WriteError(
            error.errno, f"{path}: {phase} failed: {error.strerror or error}{advice_on_writing(path, error)}"
        ) from error


def _check_listing(directory: Path, files: Mapping[str, int]) -> None:
    meant = {folder for name in files for folder in Path(name).parents}
    entries = {path.relative_to(directory): path.lstat() for path in directory.rglob("*")}
    wanted = (name for name in entries if name not in meant or not stat.S_ISDIR(entries[name].st_mode))
    found = {str(name): entries[name] for name in wanted}
    problems = [f"{name}: {_kind(found[name])} that nobody meant to write" for name in found.keys() - files.keys()]
    problems += [f"{name}: missing" for name in files.keys() - found.keys()]
    problems += [
        f"{name}: {_kind(found[name])}, expected {files[name]} bytes"
        for name in files.keys() & found.keys()
        if _kind(found[name]) != f"{files[name]} bytes"
    ]
    if problems:
        lines = "\n  ".join(sorted(problems))
        raise IncompleteCheckpointError(directory, f"does not hold what was written to it; not committed\n  {lines}")


def _kind(status: os.stat_result) -> str:
    """What is there, in words: the size of a regular file, or the mode of anything else."""
    return f"{status.st_size} bytes" if stat.S_ISREG(status.st_mode) else stat.filemode(status.st_mode)


def _make_durably(directory: Path) -> None:
    """Make a directory and its missing parents, and fsync the entries that name them."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync(path.parent)


def _lock(directory: Path) -> int | None:
    """Take the lock that says that this attempt is alive; it goes with the process. None if the directory is gone."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with contextlib.suppress(OSError):  # a file system without locks: sweep leaves attempts there alone
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # waits for a sweep that is just looking
    if directory.exists():
        return descriptor
    os.close(descriptor)
    return None


@contextlib.contextmanager
def _claim(directory: Path) -> Iterator[bool]:
    """Hold a lock that nobody holds. False if a process does, or locks do not work there, so that nobody can tell."""
    with contextlib.ExitStack() as stack:
        try:
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            claimed = True
        except OSError:
            claimed = False
        yield claimed
