"""The verbs of an object store on a file system of fsspec: for what obstore does not know, such as sftp or HDFS.

fsspec has no write that fails if the object exists and that every implementation keeps: the default looks first and
writes then. So two runs that save one step at the same moment may both believe that they have made it. The log says so
once for each store.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from shardsmith.errors import StorageError
from shardsmith.ground.object_store import PART_BYTES, ObjectStore, StoredObject, reason_of

log = logging.getLogger(__name__)

_TIMES = ("LastModified", "last_modified", "mtime", "modified", "updated", "modificationTime", "created")
"""Names under which implementations give the time of the last change."""
_MILLISECONDS_FROM = 1e11
_HOPELESS = (NotImplementedError, TypeError, ValueError, AttributeError, ImportError, PermissionError)
"""Errors that the same request would meet again."""
_warned: set[str] = set()


class FileSystemStore(ObjectStore):
    """A file system of fsspec below one bucket or host.

    Thread-safe: an implementation that is not made for several threads is asked for one thing at a time.
    """

    def put(self, key: str, data: bytes) -> None:
        """Make or replace a file. Whether it appears all at once is up to the implementation."""
        self._repeated("writing", key, lambda files: files.put(key, data))

    def put_new(self, key: str, data: bytes) -> None:
        """Make a file unless there is one; of several that try at the same moment more than one may succeed."""
        if self.url not in _warned:
            _warned.add(self.url)
            log.warning(
                "%s is written through fsspec, which cannot make an object only if there is none: if two runs save "
                "the same step there at the same moment, both may commit it, and one is lost. Let one run at a time "
                "write to a directory",
                self.url,
            )
        with self._named("writing", key):
            if self.client.find_one(key) is not None:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), f"{self.url}/{key}")
        self.put(key, data)
        if self.get(key) != data:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), f"{self.url}/{key}")

    def writer(self, key: str, expected_bytes: int = 0) -> Any:  # noqa: ARG002
        """Return a stream that writes a file; there is none if it is given up."""
        return self.client.writer(key)

    def get(self, key: str, most_bytes: int | None = None) -> bytes:
        """Return a whole file. Raises ValueError if it has more than ``most_bytes``; as ``head`` otherwise."""
        end = None if most_bytes is None else most_bytes + 1
        data: bytes = self._repeated("reading", key, lambda files: files.get(key, None, end))
        if end is not None and len(data) >= end:
            raise ValueError(f"{self.url}/{key} has more than {most_bytes} bytes")
        return data

    def range(self, key: str, start: int, end: int) -> memoryview:
        """Return the bytes from ``start`` to before ``end``. Raises FileNotFoundError, StorageError."""

        def read(files: Files) -> memoryview:
            data = memoryview(files.get(key, start, end))
            if len(data) != end - start:
                raise StorageError(f"{self.url}/{key}", f"gave {len(data)} bytes of {end - start}", transient=True)
            return data

        return self._repeated("reading", key, read)

    def head(self, key: str) -> StoredObject:
        """Return size and time of one file. Raises FileNotFoundError, StorageError."""
        found: StoredObject | None = self._repeated("looking at", key, lambda files: files.find_one(key))
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{self.url}/{key}")
        return found

    def objects(self, prefix: str) -> list[StoredObject]:
        """Return all files below a folder, in the order of their keys."""
        return sorted(self._repeated("listing", prefix, lambda files: files.find(prefix)), key=lambda one: one.key)

    def children(self, prefix: str) -> list[str]:
        """Return the names right below a folder, in their order; without folders that hold no file."""
        start = len(prefix) + 1 if prefix else 0
        return sorted({one.key[start:].partition("/")[0] for one in self.objects(prefix)})

    def delete(self, keys: Sequence[str]) -> None:
        """Delete files, one after the other; those that are gone are passed over. Their folders stay."""
        for key in keys:
            with contextlib.suppress(FileNotFoundError):
                self._repeated("deleting", key, functools.partial(Files.delete, key=key))

    def _connect(self) -> Files:
        return Files.at(self.url)

    @contextlib.contextmanager
    def _named(self, doing: str, key: str) -> Iterator[None]:
        """Turn what an implementation raises, which may be of any type, into the errors of a store."""
        where = f"{self.url}/{key}"
        try:
            yield
        except (StorageError, FileExistsError):
            raise
        except (FileNotFoundError, IsADirectoryError):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), where) from None
        except Exception as error:
            told = f"{doing} failed: {reason_of(error)}"
            raise StorageError(where, told, transient=not isinstance(error, _HOPELESS)) from None


class Files:
    """A file system of fsspec, by keys."""

    def __init__(self, system: Any, root: str) -> None:
        self._system = system
        self._root = root.rstrip("/")
        self._lock: Any = contextlib.nullcontext() if system.async_impl else threading.RLock()

    @classmethod
    def at(cls, url: str) -> Files:
        """Return that of a URL, as fsspec makes it. Raises StorageError."""
        import fsspec

        try:
            return cls(*fsspec.url_to_fs(url))
        except Exception as error:
            raise StorageError(url, f"fsspec cannot reach it: {reason_of(error)}") from None

    @classmethod
    def of(cls, system: Any, url: str) -> Files:
        """Return one of the user's own, whose paths begin with the bucket where the scheme is not its own."""
        scheme, _, bucket = url.partition("://")
        protocols = (system.protocol,) if isinstance(system.protocol, str) else system.protocol
        return cls(system, system._strip_protocol(url) if scheme in protocols else bucket)

    def put(self, key: str, data: bytes) -> None:
        """Make or replace a file, and its folders."""
        with self._lock:
            self._make_folder(key)
            self._system.pipe_file(self._path(key), data)

    def get(self, key: str, start: int | None, end: int | None) -> bytes:
        """Return the content of a file, or a range of it."""
        with self._lock:
            return bytes(self._system.cat_file(self._path(key), start=start, end=end))

    def find_one(self, key: str) -> StoredObject | None:
        """Return a file; None if there is none."""
        with self._lock:
            self._system.invalidate_cache()
            try:
                found = self._system.info(self._path(key))
            except (FileNotFoundError, NotADirectoryError):
                return None
        return _stored(key, found) if found["type"] == "file" else None

    def find(self, prefix: str) -> list[StoredObject]:
        """Return all files below a folder."""
        path = self._path(prefix)
        with self._lock:
            self._system.invalidate_cache()
            try:
                found: Mapping[str, Any] = self._system.find(path, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return []
        start = len(self._root.lstrip("/")) + 1 if self._root else 0
        return [_stored(name.lstrip("/")[start:], one) for name, one in found.items() if name.rstrip("/") != path]

    def delete(self, key: str) -> None:
        """Delete a file."""
        with self._lock:
            self._system.rm_file(self._path(key))

    def writer(self, key: str) -> _Writer:
        """Return a file that is being written."""
        with self._lock:
            self._make_folder(key)
            file = self._system.open(self._path(key), "wb", block_size=PART_BYTES)
        return _Writer(file, self._lock, lambda: self.delete(key))

    def _make_folder(self, key: str) -> None:
        folder = self._path(key).rpartition("/")[0]
        with contextlib.suppress(NotImplementedError, FileExistsError):
            self._system.makedirs(folder, exist_ok=True)

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}" if key else self._root


class _Writer:
    """A file that is being written."""

    def __init__(self, file: Any, lock: Any, remove: Callable[[], None]) -> None:
        self._file = file
        self._lock = lock
        self._remove = remove
        self._is_closed = False  # what some implementations do not tell

    def write(self, data: bytes) -> None:
        with self._lock:
            self._file.write(data)

    def closed(self) -> bool:
        return self._is_closed

    def close(self) -> None:
        with self._lock:
            self._file.close()
        self._is_closed = True

    def __exit__(self, *exc: object) -> None:
        """Give it up: by the implementation's own way, if it has one; in any case there is no file afterwards."""
        from fsspec.spec import AbstractBufferedFile

        with self._lock:
            if isinstance(self._file, AbstractBufferedFile):  # whose close would write the rest
                self._file.discard()
                self._file.closed = True
            else:
                self._file.close()
        self._remove()


def _stored(key: str, info: Mapping[str, Any]) -> StoredObject:
    return StoredObject(key, int(info["size"]), _time_in(info))


def _time_in(info: Mapping[str, Any]) -> datetime:
    """The time of the last change; now if it is not given: what cannot be dated is not taken for old."""
    for name in _TIMES:
        value = info.get(name)
        if isinstance(value, datetime):
            return value if value.tzinfo else value.replace(tzinfo=UTC)
        if isinstance(value, int | float):
            return datetime.fromtimestamp(value / 1000 if value > _MILLISECONDS_FROM else value, UTC)
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                found = datetime.fromisoformat(value)
                return found if found.tzinfo else found.replace(tzinfo=UTC)
    return datetime.now(UTC)
