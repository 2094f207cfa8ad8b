"""The types of public arguments: paths, numbers, sizes, dtypes and objects, each with the rule that it keeps."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch

from shardsmith.errors import UsageError
from shardsmith.ground.remote_path import RemotePath, as_path
from shardsmith.ground.sizes import parse_size
from shardsmith.ground.stores import why_refused
from shardsmith.tensors.dtypes import parse_dtypes

from .converting import MOST, NAMES, RefusedError, number_or_nan

_REMOTE = re.compile(r"(?:[A-Za-z0-9+.-]+::)*(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):/")  # Path("s3://a/b") is "s3:/a/b"
_STORES = ", or a place in an object store: s3://, gs://, az:// or a protocol that fsspec knows"
_MOUNTED = "give a path of a file system that is mounted here"
_LONGEST_NAME = 255
"""Bytes of a file's name on the usual file systems."""


def is_url(value: object) -> bool:
    """Return whether a string or path has a scheme: a place that is not on a file system."""
    return _REMOTE.match(str(value)) is not None


def _number(expected: str, fits: Callable[[Any], bool]) -> Callable[[Any], Any]:
    def rule(value: Any) -> Any:
        if not fits(value):
            raise RefusedError(value, f"{expected} is expected", has_cure=True)
        return value

    return rule


def _local(value: str | Path, also: str = "") -> Path:
    """``also``: what else may be given, for the error."""
    text = str(value)
    if not text:
        raise RefusedError(value, 'a path is expected; "." is the current directory', has_cure=True)
    if remote := _REMOTE.match(text):
        scheme = remote["scheme"]
        cure = "write the path alone" if scheme == "file" else f"{_MOUNTED}{also}"
        raise RefusedError(value, f"{scheme}:// is not supported here; {cure}", has_cure=True)
    if text.startswith("~"):
        raise RefusedError(value, f"~ is not expanded; write {os.path.expanduser(text)!r}", has_cure=True)
    if "\0" in text or any(len(os.fsencode(name)) > _LONGEST_NAME for name in text.split(os.sep)):
        names = f"names without NUL, of {_LONGEST_NAME} bytes at most"
        raise RefusedError(value, f"a path is expected, which consists of {names}", has_cure=True)
    return Path(value)


def _place(value: str | Path) -> Path:
    return _remote(value) or _directory(value, _STORES)


def _any(value: str | Path) -> Path:
    return _remote(value) or _local(value, _STORES)


def _remote(value: str | Path) -> RemotePath | None:
    path = as_path(value)
    if not isinstance(path, RemotePath):
        return None
    scheme, place = path.parts[0].rstrip(":"), path.parts[1]
    may_have_user = scheme not in ("s3", "gs", "az")  # abfs://container@account..., sftp://user@host
    has_secret = "@" in place and (not may_have_user or ":" in place.partition("@")[0])
    if has_secret or ".." in path.parts or any(sign in str(path) for sign in "\0?#\\"):
        expected = (
            "a URL of scheme, bucket and names is expected, such as s3://bucket/run, without credentials and without "
            "?, #, \\ or .. in a name"
        )
        raise RefusedError(value, expected, has_cure=True)
    if refusal := why_refused(str(path)):
        cure = "write the path alone" if scheme in ("file", "local") else f"{_MOUNTED}{_STORES}"
        raise RefusedError(value, f"{refusal}; {cure}", has_cure=True)
    return path


def _directory(value: str | Path, also: str = "") -> Path:
    path = _local(value, also)
    for place in (path, *path.parents):
        if os.path.lexists(place):
            # The nearest that is there must be a directory: what is below it can be made.
            if not place.is_dir():
                what = "a file" if place.exists() else "a broken link"
                raise RefusedError(value, f"a directory is expected, but {place} is {what}", has_cure=True)
            # No further up: a directory that is there has directories above it.
            break
    return path


def _size(value: str | int) -> str | int:
    try:
        parse_size(value)
    except UsageError as error:
        raise RefusedError(value, str(error), has_cure=True) from None
    return value


def _dtype(value: Any) -> Any:
    try:
        parse_dtypes(value)
    except UsageError as error:
        raise RefusedError(value, str(error), has_cure=True) from None
    return value


LocalPath = Annotated[str | Path, _local]
"""A path of this machine; what is there is not looked at."""
AsPath = Annotated[Path, _local]
"""As ``LocalPath``, for code that goes on with a ``Path``; strings are taken all the same."""
Directory = Annotated[str | Path, _directory]
"""A directory of this machine, there or to be made."""
Place = Annotated[str | Path, _place]
"""A directory of this machine, or a place in an object store such as ``s3://bucket/run``."""
AnyPath = Annotated[str | Path, _any]
"""A path of this machine, or a place in an object store such as ``s3://bucket/run/step-500``."""
AsAnyPath = Annotated[Path, _any]
"""As ``AnyPath``, for code that goes on with a ``Path``; strings are taken all the same."""
Count = Annotated[int, _number("a whole number from 1 on", lambda number: 1 <= number <= MOST)]
"""1, 2, ..."""
StepNumber = Annotated[int, _number("a whole number from 0 on (at most 18 digits)", lambda n: 0 <= n < 10**18)]
"""0, 1, ..."""
Positive = Annotated[float, _number("a number above 0", lambda number: number > 0)]
"""A number above 0."""
Number = Annotated[Any, number_or_nan]
"""A measured number: NaN is one, too."""
NotNegative = Annotated[float, _number("a number from 0 on", lambda number: number >= 0)]
"""0 or a number above."""
Seconds = Annotated[float, _number("a number of seconds above 0", lambda number: number > 0)]
"""A time in seconds; may be infinite."""


class HasState(Protocol):
    """As torch's ``Stateful``, whose import would bring all of ``torch.distributed.checkpoint``."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state."""


class HasConfigDict(Protocol):
    """A config of transformers."""

    def to_dict(self) -> dict[str, Any]:
        """Return its settings."""


class HasFiles(Protocol):
    """A tokenizer or processor of transformers."""

    def save_pretrained(self, save_directory: Any) -> object:
        """Write its files into a directory."""


NAMES |= {
    HasState: "an object with state_dict and load_state_dict",
    HasConfigDict: "a config of transformers",
    HasFiles: "a tokenizer or processor with save_pretrained",
}


def _scheduler(value: Any) -> Any:
    # An optimizer has the methods of a schedule, so only its type tells.
    if isinstance(value, torch.optim.Optimizer | torch.nn.Module):
        raise RefusedError(value, "a schedule of the learning rate is expected", has_cure=True)
    return value


def _not_empty(value: Any) -> Any:
    if isinstance(value, list) and not value:
        raise RefusedError(value, "at least one is expected", has_cure=True)
    return value


Scheduler = Annotated[HasState, _scheduler]
"""A learning rate schedule; it could be mistaken for the optimizer, which has the same methods."""
ModelConfig = AnyPath | Mapping[str, Any] | HasConfigDict
"""What a model is to compute: a config of transformers, its dict, or a directory with a config.json."""
Models = Annotated[torch.nn.Module | Sequence[torch.nn.Module], _not_empty]
"""A model, or all parts of it that this rank has."""
Decay = Annotated[float, _number("a number from 0 to below 1 (1 would never move the average)", lambda d: 0 <= d < 1)]
"""The decay of an average."""
Size = Annotated[str | int, _size]
"""A size in bytes: ``"5GB"`` or 5_000_000_000."""
Dtype = Annotated[str | torch.dtype | Mapping[str, str | torch.dtype], _dtype]
"""The dtype of tensors in files: one, ``"original"``, or one for each pattern of names."""
