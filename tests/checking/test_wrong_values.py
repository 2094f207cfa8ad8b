"""Every argument of every public object, with values that it cannot take: an error of ours, and nothing deeper."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Unpack, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

import shardsmith
from shardsmith import hooks
from shardsmith.errors import ShardsmithError, UsageError
from shardsmith.hooks import every
from shardsmith.integrations.accelerate import attach
from shardsmith.integrations.transformers import CheckpointHooks


class Hostile:
    """Fails whatever is asked of it."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("eq")

    def __repr__(self) -> str:
        raise RuntimeError("repr")

    def __len__(self) -> int:
        raise RuntimeError("len")

    def __iter__(self) -> Iterator[Any]:
        raise RuntimeError("iter")

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)


WRONG: dict[str, Any] = {  # no argument takes any of these
    "an object": object(),
    "a module": inspect,
    "an ellipsis": ...,
    "a complex number": 1j,
    "bytes": b"word",
    "an exception": ValueError("x"),
    "a tensor of two": torch.ones(2),
    "a tensor without a value": torch.empty((), device="meta"),
    "a dtype of integers": torch.int8,
    "what raises": Hostile(),
}
ODD: dict[str, Any] = {  # some take some of these
    "None": None,
    "True": True,
    "True of numpy": np.bool_(True),
    "minus one": -1,
    "half": 2.5,
    "NaN": float("nan"),
    "infinity": float("inf"),
    "a huge number": 10**400,
    "a word": "no-such-thing",
    "no word": "",
    "a NUL": "a\0b",
    "half a character": "a\ud800b",
    "a long word": "x" * 5000,
    "a remote path": "nowhere://bucket/x",
    "a chain of remote paths": "simplecache::s3://bucket/x",
    "a home": "~/x",
    "an array": np.ones(2),
    "a tensor of one": torch.tensor(3),
    "a list of lists": [[1]],
    "a mapping of numbers": {1: 2},
    "a class": nn.Linear,
    "a function of another shape": lambda: None,
    "a schedule": every(3),
    "an optimizer": torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1),
}
ANYTHING = {"extra_facts", "data_status", "ranks"}
"""Arguments whose values are the caller's own; ``ranks`` is not for users."""


@functools.cache
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


READERS = ("open_checkpoint", "detect_checkpoint_format", "inspect_checkpoint", "inspect_run", "list_tensors")
READERS += ("newest_step",)


def valid_arguments(name: str, place: Path) -> dict[str, Any]:
    """What an object needs besides the argument that is tried."""
    model = nn.Linear(2, 2)
    saves = {"directory": place, "model": model, "when": every(5)}
    return {
        "EMA": {"model": model},
        "ShardedSave": saves,
        "HFExport": saves,
        "FolderSave": {"model": model},
        "InitialLoad": {"path": place, "model": model},
        "Recorder": {"directory": place, "model": model},
        "ShardedCheckpointManager": {"directory": place, "model": model},
        "Event": {"kind": "save", "step": 1, "path": "run"},
        "best": {"metric": "loss"},
        "low_disk": {"below": "1GB"},
        "CheckpointHooks": {"export": every(3), "ema_decay": 0.9},
        "attach": {"accelerator": accelerator(), "hooks": hooks.Hooks(), "model": model} if name == "attach" else {},
        "per_rank": {"thing": torch.optim.SGD(model.parameters(), lr=0.1)},
        "poison_weights": {"model": model},
        "load_initial": {"path": place, "model": model},
        "verify_loaded": {"model": model, "path": place},
        "verify_checkpoints": {"left": place, "right": place},
        **{name: {"path": place} for name in READERS},
    }.get(name, {})


def arguments_of(thing: Callable[..., Any]) -> list[tuple[str, bool]]:
    """Names of the arguments, and whether each takes several by position; fields of option groups one by one."""
    function = inspect.unwrap(thing.__init__ if isinstance(thing, type) else thing)  # type: ignore[misc]
    hints = get_type_hints(function, include_extras=True)
    found = []
    for name, parameter in inspect.signature(function).parameters.items():
        if get_origin(hints.get(name)) is Unpack:
            found += [(option, False) for option in get_type_hints(get_args(hints[name])[0])]
        elif name != "self":
            found.append((name, parameter.kind is inspect.Parameter.VAR_POSITIONAL))
    return found


def tried(call: Callable[[], Any]) -> bool:
    """Whether the value is taken. Raises what is no error of ours."""
    try:
        made = call()
    except ShardsmithError:
        return False
    if hasattr(made, "close"):
        made.close()
    return True


def cases() -> list[Any]:
    own = [(name, getattr(hooks, name)) for name in hooks.__all__ if name not in ("Hook", "finish")]
    core = ["load_initial", "verify_loaded", "poison_weights", "verify_checkpoints", "ShardedCheckpointManager"]
    core += READERS
    all_of_them = own + [(name, getattr(shardsmith, name)) for name in core]
    all_of_them += [("CheckpointHooks", CheckpointHooks), ("attach", attach)]
    return [pytest.param(name, thing, id=name) for name, thing in all_of_them if arguments_of(thing)]


@pytest.mark.filterwarnings("ignore::UserWarning")  # numpy's, of a comparison
@pytest.mark.parametrize(("name", "thing"), cases())
def test_a_value_that_cannot_be_taken_is_an_error_of_ours(
    name: str, thing: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    for argument, by_position in arguments_of(thing):
        for what, value in {**WRONG, **ODD}.items():

            def call(argument: str = argument, value: Any = value, by_position: bool = by_position) -> Any:
                given = valid_arguments(name, tmp_path / "run")
                return thing(value) if by_position else thing(**{**given, argument: value})

            if what in WRONG and argument not in ANYTHING:
                with pytest.raises(UsageError):
                    call()
            else:
                tried(call)


METHODS = [
    (hooks.Hooks, "step", {}),
    (hooks.Hooks, "optimizer_step", {}),
    (hooks.Hooks, "step_end", {}),
    (hooks.Hooks, "add", {}),
    (hooks.Hooks, "train_end", {}),
    (hooks.Hooks, "metric", {"step": 1}),
    (hooks.EMA, "load_state_dict", {"state_dict": {}}),
    (hooks.ShardedSave, "save", {}),
    (hooks.ShardedSave, "saving", {}),
    (hooks.ShardedSave, "resume", {}),
    (hooks.ShardedSave, "load", {"checkpoint": "no-such"}),
    (hooks.HFExport, "export", {}),
    (hooks.FolderSave, "before_save", {}),
    (hooks.FolderSave, "save", {"step": 1, "folder": "no-such"}),
    (hooks.FolderSave, "has", {}),
    (hooks.FolderSave, "load", {"folder": "no-such"}),
    (hooks.Recorder, "begin", {}),
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("cls", "method", "valid"), METHODS, ids=[f"{cls.__name__}.{m}" for cls, m, _ in METHODS])
def test_so_it_is_for_what_is_called_later(
    cls: type, method: str, valid: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    thing = cls(**valid_arguments(cls.__name__, tmp_path / "run"))
    for argument, _ in arguments_of(getattr(cls, method)):
        for what, value in {**WRONG, **ODD}.items():
            given = {**valid, argument: value}
            if what in WRONG:
                with pytest.raises(UsageError):
                    getattr(thing, method)(**given)
            else:
                tried(lambda given=given: getattr(thing, method)(**given))  # type: ignore[misc]
    thing.close() if hasattr(thing, "close") else None
