"""The tree of errors: as it is drawn, and whole after a pickle."""

from __future__ import annotations

import builtins
import pickle
import re
from pathlib import Path

import pytest

from shardsmith import errors
from shardsmith.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    MismatchError,
    NotEnoughMemoryError,
    RankFailedError,
    RankTimeoutError,
    ShardsmithError,
    StorageError,
    TargetError,
    WriteError,
)


def classes(base: type[ShardsmithError] = ShardsmithError) -> list[type[ShardsmithError]]:
    """A class and all below it that the package has, in the order of the drawing."""
    below = [kind for kind in base.__subclasses__() if kind.__module__ == errors.__name__]
    return [base, *(kind for child in below for kind in classes(child))]


def example(kind: type[ShardsmithError]) -> ShardsmithError:
    """An error of a class, with every argument that it takes."""
    if issubclass(kind, MismatchError):
        return kind("run/step-5", "1 of 2 differ", ["w: saved (3,), asked for (4,)"], "Nothing was loaded.")
    if issubclass(kind, CheckpointError | TargetError):
        return kind("run/step-5", "is not what it should be")
    if issubclass(kind, RankFailedError):
        return kind("writing step-5", {1: "OSError: disk full", 0: "KeyError: 'w'"}, 4)
    if issubclass(kind, RankTimeoutError):
        return kind("writing step-5", [2, 3], 1.5)
    if issubclass(kind, NotEnoughMemoryError):
        return kind("staging step-5: too little memory", ["one: 4 ranks need 2 GB more, and 1 GB are left"])
    if issubclass(kind, StorageError):
        return kind("s3://bucket/run", "was refused", transient=True)
    return kind("something went wrong")


def drawn() -> list[tuple[int, str, str | None]]:
    """Depth, name and built-in base of each class in the docstring."""
    assert errors.__doc__ is not None
    lines = re.findall(r"^([│├└─ ]*)(\w+Error)(?: \((\w+)\))?", errors.__doc__, re.MULTILINE)
    return [(len(indent) // 4, name, base or None) for indent, name, base in lines]


def depth(kind: type[ShardsmithError]) -> int:
    return sum(issubclass(base, ShardsmithError) for base in kind.__mro__) - 1


def own_builtin(kind: type[ShardsmithError]) -> str | None:
    """The built-in error that a class names beside its place in the tree."""
    names = [base.__name__ for base in kind.__bases__ if base.__module__ == builtins.__name__]
    return names[0] if names and kind is not ShardsmithError else None


def test_the_tree_is_drawn_as_it_is() -> None:
    assert drawn() == [(depth(kind), kind.__name__, own_builtin(kind)) for kind in classes()]


@pytest.mark.parametrize("kind", classes())
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_an_error_survives_a_pickle(kind: type[ShardsmithError], protocol: int) -> None:
    error = example(kind)
    error.add_note("on rank 3")
    copy = pickle.loads(pickle.dumps(error, protocol))
    assert type(copy) is kind
    assert (str(copy), copy.args, vars(copy)) == (str(error), error.args, vars(error))


def test_attributes_are_what_was_given() -> None:
    copy = pickle.loads(pickle.dumps(example(RankFailedError)))
    assert (copy.phase, copy.failures) == ("writing step-5", {0: "KeyError: 'w'", 1: "OSError: disk full"})
    assert pickle.loads(pickle.dumps(example(CheckpointNotFoundError))).path == Path("run/step-5")


def test_a_system_error_keeps_its_number() -> None:
    copy = pickle.loads(pickle.dumps(WriteError(28, "No space left on device")))
    assert (copy.errno, copy.strerror, str(copy)) == (
        28,
        "No space left on device",
        "[Errno 28] No space left on device",
    )
