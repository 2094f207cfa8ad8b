"""Places in an object store as paths: ``RemotePath("s3://bucket/run/step-500")``.

A store has no directories and renames nothing. A step lies there so:

    run/step-500/3f0c.../__0_0.distcp    the files of the attempt that has this id: put first, in any order
    run/step-500/3f0c.../.metadata
    run/step-500/metadata.json           the manifest, put last and only if there is none: it names the attempt

So attempts never meet, the step exists once its manifest does, and who puts that is decided by the store. What reads a
file of the step, ``run/step-500/__0_0.distcp``, is given that of the attempt.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Generator
from pathlib import Path, PosixPath

from shardsmith.ground.layout import METADATA_FILE, MOST_MANIFEST_BYTES, parse_step
from shardsmith.ground.object_store import ObjectStore
from shardsmith.ground.stores import store_at

_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+)://?(?P<rest>[^/].*)")
_ATTEMPT_IN_MANIFEST = re.compile(rb'"attempt": ?"([0-9a-f]{16})"')
_MANIFEST_HEAD_BYTES = 1 << 12
# Step -> the attempt that made it, as far as this process has read manifests.
_attempts: dict[str, str] = {}


class RemotePath(PosixPath):
    """A path in an object store. It can be joined, compared and printed as any other, and read by this package.

    What asks the operating system for it gets a TypeError, so that nothing of that name is made on a local disk.
    """

    def __str__(self) -> str:
        """Return the URL; of a path that is relative to another, the names alone."""
        # PosixPath makes one slash of several, so the URL gets its second one back here.
        scheme, separator, rest = super().__str__().partition(":/")
        if not separator:
            return scheme
        return f"{scheme}://{rest}"

    def __fspath__(self) -> str:
        """Raise TypeError: it is no path of this machine."""
        raise TypeError(f"{self} is in an object store, which this operation cannot reach")

    @property
    def store(self) -> ObjectStore:
        """The store that it is in."""
        scheme, bucket, *_ = self.parts
        return store_at(f"{scheme}//{bucket}")

    @property
    def key(self) -> str:
        """What it is called in its store."""
        # The first two parts are scheme and bucket.
        return "/".join(self.parts[2:])

    @property
    def located(self) -> RemotePath:
        """Where it lies: of a file of a step, below the attempt that made the step."""
        step = self.parent
        if parse_step(step.name) is None or self.name == METADATA_FILE:
            return self
        attempt = _attempts.get(str(step)) or self._ask(step)
        return self if attempt is None else step / attempt / self.name

    def forget(self) -> None:
        """Look again which attempt has made this step, when a file of it is used next."""
        _attempts.pop(str(self), None)

    def read_all(self, most_bytes: int | None = None) -> bytes:
        """Return its content. Raises FileNotFoundError, StorageError; ValueError if it has more than ``most_bytes``."""
        path = self.located
        data = path.store.get(path.key, most_bytes)
        if self.name == METADATA_FILE and (found := _ATTEMPT_IN_MANIFEST.search(data[:_MANIFEST_HEAD_BYTES])):
            _attempts[str(self.parent)] = found[1].decode()
        return data

    def sizes(self) -> dict[str, int]:
        """Return the sizes in bytes of the files of a step, or of all objects below any other path, by name."""
        if parse_step(self.name) is not None:
            manifest = (self / METADATA_FILE).read_all()
            return {**(self / _attempts[str(self)]).sizes(), METADATA_FILE: len(manifest)}
        return self.objects_below()

    def objects_below(self) -> dict[str, int]:
        """Return the sizes in bytes of all objects whose keys begin with this path, by the rest of their keys."""
        prefix = f"{self.key}/" if self.key else ""
        return {one.key.removeprefix(prefix): one.size for one in self.store.objects(self.key)}

    @staticmethod
    def _ask(step: Path) -> str | None:
        assert isinstance(step, RemotePath)
        try:
            (step / METADATA_FILE).read_all(MOST_MANIFEST_BYTES)
        except (FileNotFoundError, ValueError):  # what is so large is no manifest of ours
            return None
        return _attempts.get(str(step))

    # What pathlib would ask the operating system for.

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:  # noqa: ARG002
        """Return the size, as of a regular file; of what is only a prefix of keys, as of a directory."""
        path = self.located
        try:
            if not self.key:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
            found = path.store.head(path.key)
            return _status(stat.S_IFREG | 0o444, found.size, found.modified.timestamp())
        except FileNotFoundError:
            if self.is_dir():
                return _status(stat.S_IFDIR | 0o555, 0, 0.0)
            raise

    def lstat(self) -> os.stat_result:
        """As ``stat``."""
        return self.stat()

    def exists(self, *, follow_symlinks: bool = True) -> bool:  # noqa: ARG002
        """Return whether there is such an object, or one below it."""
        return self.is_file() or self.is_dir()

    def is_file(self, *, follow_symlinks: bool = True) -> bool:  # noqa: ARG002
        """Return whether there is such an object."""
        # Stores answer a request for a bucket as one for an object.
        if not self.key:
            return False
        path = self.located
        try:
            path.store.head(path.key)
        except FileNotFoundError:
            return False
        return True

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:  # noqa: ARG002
        """Return whether there is any object below it."""
        return bool(self.store.children(self.key))

    def is_symlink(self) -> bool:
        """Return False."""
        return False

    def is_absolute(self) -> bool:
        """Return True."""
        return True

    def absolute(self) -> RemotePath:
        """Return itself."""
        return self

    def resolve(self, strict: bool = False) -> RemotePath:  # noqa: ARG002
        """Return itself."""
        return self

    def iterdir(self) -> Generator[RemotePath, None, None]:
        """Yield what is right below it."""
        is_step = parse_step(self.name) is not None and (self / METADATA_FILE).is_file()
        for name in self.sizes() if is_step else self.store.children(self.key):
            yield self / name

    def read_bytes(self) -> bytes:
        """As ``read_all``."""
        return self.read_all()

    def write_text(
        self,
        data: str,
        encoding: str | None = None,
        errors: str | None = None,  # noqa: ARG002
        newline: str | None = None,  # noqa: ARG002
    ) -> int:
        """Put an object, or replace it, such as a page of a command. Raises StorageError."""
        self.store.put(self.key, data.encode(encoding or "utf-8"))
        return len(data)


def as_path(value: str | Path) -> Path:
    """Return a path, which is a ``RemotePath`` for a URL of a store that is supported."""
    if isinstance(value, RemotePath):
        return value
    match = _URL.fullmatch(str(value))
    if match is None:
        return Path(value)
    return RemotePath(f"{match['scheme']}:", match["rest"])


def _status(mode: int, size: int, modified: float) -> os.stat_result:
    # mode, inode, device, links, user, group, size, and the times of access, modification and change
    return os.stat_result((mode, 0, 0, 1, 0, 0, size, 0, int(modified), 0))
