"""Every exception that Shardsmith raises on purpose.

ShardsmithError
├── UsageError (ValueError)                 the call makes no sense; nothing was touched
├── CheckpointError                         something on disk cannot be used
│   ├── CheckpointNotFoundError (FileNotFoundError)
│   ├── IncompleteCheckpointError           missing or truncated files, tensors with holes
│   ├── CorruptCheckpointError              the bytes are not what they should be
│   ├── UnsafeCheckpointError               it asks for code to be run, or points outside its directory
│   ├── UnsupportedFormatError              not a layout, version, dtype or transform that we read
│   └── MismatchError                       names, shapes or dtypes differ from what was asked for
│       └── InitialLoadError                the model that is about to train is not the one in the checkpoint
├── TargetError                             the place to write to cannot be used
│   ├── TargetExistsError (FileExistsError)
│   └── ProtectedPathError                  it is, holds, or lies in something that must not be written
├── StorageError                            an object store was not reached, or it refused a request
├── WriteError (OSError)                    a write failed; nothing was published
├── NotEnoughMemoryError (MemoryError)      a host has too little memory for a copy; nothing was copied
└── RankError (RuntimeError)
    ├── RankFailedError                     a rank raised; every rank raises this, naming it
    ├── RankTimeoutError (TimeoutError)     a rank did not answer in time
    └── RanksDisagreeError                  the ranks were called with different things
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


class ShardsmithError(Exception):
    """Base of all errors of this package. They survive a pickle, as on their way out of a worker process."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Python would call the class with ``args``, the finished message, and __init__ wants what it is made of.
        return _rebuild, (type(self), self.args), self.__dict__


def _rebuild(kind: type[ShardsmithError], args: tuple[Any, ...]) -> ShardsmithError:
    base = OSError if issubclass(kind, OSError) else Exception  # the one whose fields it has
    error = base.__new__(kind, *args)
    error.args = args
    return error


class UsageError(ShardsmithError, ValueError):
    """The arguments contradict each other or the state of the object. Nothing was touched."""


class CheckpointError(ShardsmithError):
    """A checkpoint, or a file of one, cannot be used.

    Attributes:
        path: The file or directory at fault.
    """

    def __init__(self, path: str | Path, message: str) -> None:
        super().__init__(f"{path}: {message}")
        self.path = path if isinstance(path, Path) else Path(path)


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no checkpoint where one was asked for."""


class IncompleteCheckpointError(CheckpointError):
    """Files are missing or truncated, or a tensor is not covered by its chunks."""


class CorruptCheckpointError(CheckpointError):
    """The content contradicts itself or its recorded digest."""


class UnsafeCheckpointError(CheckpointError):
    """Reading it would run code or leave its directory; it was not read."""


class UnsupportedFormatError(CheckpointError):
    """A layout, version, dtype or transform that this version does not read."""


class MismatchError(CheckpointError):
    """Tensors differ from what was asked for.

    Attributes:
        summary: What is at fault.
        problems: One line per tensor at fault, all of them.
        advice: What to do.
    """

    def __init__(self, path: str | Path, summary: str, problems: list[str], advice: str) -> None:
        super().__init__(path, "\n  ".join([summary, *problems]) + f"\n{advice}")
        self.summary = summary
        self.problems = list(problems)
        self.advice = advice


class InitialLoadError(MismatchError):
    """The model that is about to train is not the one in the checkpoint.

    Attributes:
        codes: Code of each fault, in the order of ``problems``; see ``shardsmith.load.faults``.
    """

    def __init__(
        self, path: str | Path, summary: str, problems: list[str], advice: str, codes: Sequence[str] = ()
    ) -> None:
        super().__init__(path, summary, problems, advice)
        self.codes = list(codes)


class TargetError(ShardsmithError):
    """Nothing can be written there.

    Attributes:
        path: The target.
    """

    def __init__(self, path: str | Path, message: str) -> None:
        super().__init__(f"{path}: {message}")
        self.path = path if isinstance(path, Path) else Path(path)


class TargetExistsError(TargetError, FileExistsError):
    """The target exists already; it was left as it is."""


class ProtectedPathError(TargetError):
    """The target is the same as, inside, around, or linked to something that must not be written."""


class StorageError(ShardsmithError):
    """A request to an object store failed, after all repetitions. It says nothing about what is stored there.

    Attributes:
        url: What was asked for.
        transient: Whether the same request may succeed later.
    """

    def __init__(self, url: str, message: str, *, transient: bool = False) -> None:
        super().__init__(f"{url}: {message}")
        self.url = url
        self.transient = transient


class WriteError(ShardsmithError, OSError):
    """A write failed. What was being written is not visible; what was there before is untouched."""


class NotEnoughMemoryError(ShardsmithError, MemoryError):
    """The ranks of a host are about to take more memory than it has left. Nothing was copied or written.

    Attributes:
        problems: One line for each host, with figures.
    """

    def __init__(self, summary: str, problems: Sequence[str]) -> None:
        advice = (
            "Nothing was written; the training may go on. A save with max_host_memory= copies in parts, and one with "
            'async_mode="disabled" not at all; an export with source="checkpoint" needs no copy either.'
        )
        super().__init__("\n  ".join([summary, *problems]) + f"\n{advice}")
        self.problems = list(problems)


class RankError(ShardsmithError, RuntimeError):
    """The ranks could not act together."""


class RankFailedError(RankError):
    """Some rank raised, so all ranks raise.

    Attributes:
        phase: What the ranks were doing.
        failures: Rank -> "Type: message" of the original error.
    """

    def __init__(self, phase: str, failures: dict[int, str], world_size: int) -> None:
        lines = [f"rank {rank}: {text}" for rank, text in sorted(failures.items())]
        super().__init__(f"{phase} failed on {len(failures)} of {world_size} ranks\n  " + "\n  ".join(lines))
        self.phase = phase
        self.failures = dict(failures)


class RankTimeoutError(RankError, TimeoutError):
    """Some ranks did not answer in time, or have died.

    Attributes:
        phase: What the ranks were doing.
        missing: The ranks that were not heard of.
    """

    def __init__(self, phase: str, missing: list[int], timeout_secs: float, reason: str | None = None) -> None:
        names = ", ".join(map(str, missing))
        late = f" within {timeout_secs:g} s (crashed, hung or slow)"
        super().__init__(f"{phase}: rank {names} did not respond{f': {reason}' if reason else late}")
        self.phase = phase
        self.missing = list(missing)


class RanksDisagreeError(RankError):
    """The ranks were called with different arguments or hold different models. Nothing was written."""
