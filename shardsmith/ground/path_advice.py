"""What errors about a path say besides: what exists under similar names, how much space is free, who may write."""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from shardsmith.errors import CheckpointError, CheckpointNotFoundError, ShardsmithError
from shardsmith.ground.printable import printable
from shardsmith.ground.remote_path import RemotePath

# Of a device or a file server that fails, not of a wrong path: ESTALE is NFS's, ENOTCONN mostly FUSE's.
_FAILING = (errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV, errno.ENOTCONN, errno.ETIMEDOUT)
_MOST_NAMES = 3
_MOST_ENTRIES = 10_000
"""Of a folder with more entries none is named: to compare them all would take seconds."""


def not_there(path: Path, kind: str = "file or directory", advice: str = "") -> CheckpointNotFoundError:
    """Return the error for a local path that does not exist.

    Args:
        path: The path.
        kind: What was expected there.
        advice: What to do, as the end of the sentence.
    """
    if path.is_symlink():
        what = [f"is a link to {printable(str(path.readlink()))}, which does not exist"]
    else:
        what = [f"there is no such {kind}", *_hints(path)]
    parts = [*what, *([advice] if advice else [])]
    return CheckpointNotFoundError(path, "; ".join(parts))


def not_readable(path: Path, error: OSError) -> CheckpointError:
    """Return the error for a local path whose reading has failed, with what to do where that is clear.

    Args:
        path: What was read, if the error does not name a file.
        error: Of the operating system.
    """
    place = Path(error.filename) if isinstance(error.filename, str) else path
    parts = [f"{error.strerror or error}\nNothing was written"]
    if error.errno in (errno.EACCES, errno.EPERM):
        # `abspath` asks nothing of the disk; `resolve` would follow links into what cannot be read.
        file = Path(os.path.abspath(place))
        seen = next(one for one in (file, *file.parents) if os.path.lexists(one))
        parts.append(f"This user may not read it: `ls -ld {printable(str(seen))}` shows who may")
    elif error.errno in _FAILING:
        parts.append(
            "The disk or the network file system fails there: `dmesg` and whoever keeps it know more. Try again when "
            "it is repaired, or take another step or a copy on another disk"
        )
    return CheckpointError(place, ". ".join(parts) + ".")


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Within it, what the operating system refuses is a CheckpointError, as ``not_readable`` makes it."""
    try:
        yield
    # BrokenPipeError is an OSError, too, but of the reader of our output and not of the path.
    except (ShardsmithError, BrokenPipeError):
        raise
    except OSError as error:
        raise not_readable(path, error) from error


def _hints(path: Path) -> list[str]:
    """Where the path ends to exist, or names like its own beside it."""
    parent = path.parent
    if not parent.is_dir():
        return [f"the folder {printable(str(parent))} does not exist either"]
    try:
        names = [entry.name for entry, _ in zip(parent.iterdir(), range(_MOST_ENTRIES), strict=False)]
    except OSError:
        return []
    if len(names) == _MOST_ENTRIES:
        return []
    close = difflib.get_close_matches(path.name, names, _MOST_NAMES)
    return [f"similar names there: {', '.join(map(printable, sorted(close)))}"] if close else []


def advice_on_writing(path: Path, error: OSError) -> str:
    """Return the end of the sentence about a write that failed: the free space, or who may not write; "" if neither."""
    if isinstance(path, RemotePath):
        return ""
    existing = next((p for p in (path, *path.parents) if os.path.lexists(p)), path)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f" ({shutil.disk_usage(existing).free / 1e9:.2f} GB free on {existing})"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"; this user may not write to {existing}: choose another directory, or change its permissions"
    return ""
