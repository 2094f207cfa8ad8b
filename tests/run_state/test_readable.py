"""Values beside the tensors: what is saved can be resumed, and what could not be is refused before it is saved."""

from __future__ import annotations

import dataclasses
import enum
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from shardsmith.errors import UsageError
from shardsmith.hooks import ShardedSave, every, per_rank
from shardsmith.manifest.checkpoints import committed_steps


class Keeper:
    """A state that a user writes."""

    def __init__(self, value: Any = None) -> None:
        self.state = value

    def state_dict(self) -> dict[str, Any]:
        return {"kept": self.state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state = state_dict["kept"]


@dataclasses.dataclass
class Settings:
    """Of a user."""

    rate: float = 0.1


class Color(enum.Enum):
    """Of a user."""

    RED = 1


READABLE: list[Any] = [
    (1, [2.5, None], b"x"),
    {1, 2},
    torch.bfloat16,
    2**70,
    torch.ones(2).tolist(),
]
NUMPY = [np.float16(0.5), [np.float64(0.1), (np.int64(3),)], np.bool_(True)]
PYTHON = [0.5, [0.1, (3,)], True]
UNREADABLE: list[tuple[Any, str]] = [
    (np.arange(3), r"data\.kept: an array of numpy; return torch\.from_numpy\(array\)"),
    (np.random.RandomState(0).get_state(), r"data\.kept\.1: an array of numpy"),
    (
        Settings(),
        r"data\.kept: a Settings of .*test_readable, which cannot be read without running code",
    ),
    (Color.RED, r"data\.kept: a Color of "),
    (Path("x"), r"data\.kept: a PosixPath of pathlib"),
    (lambda: 1, r"data\.kept: a function of builtins, which cannot be pickled"),
    (np.datetime64("2020-01-01"), r"data\.kept: a datetime64 of numpy"),
]


def make(directory: Path, **options: Any) -> ShardedSave:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["lr"] = np.cos(np.float64(1.0))  # as a schedule of one's own does
    return ShardedSave(directory, model=model, optimizer=optimizer, when=every(1), **options)


def round_trip(directory: Path, value: Any, wrap: Any) -> Any:
    saved, loaded = Keeper(value), Keeper()
    for keeper in (saved, loaded):
        save = make(directory, stateful={"data": wrap(keeper)})
        if keeper is saved:
            save.save(1)
        else:
            assert save.resume() == 1
        save.close()
    return loaded.state


def as_it_is(thing: Any) -> Any:
    return thing


@pytest.mark.parametrize("wrap", [as_it_is, per_rank])
def test_what_is_saved_comes_back(wrap: Any, tmp_path: Path) -> None:
    assert round_trip(tmp_path, READABLE, wrap) == READABLE
    assert math.isnan(round_trip(tmp_path / "nan", float("nan"), wrap))


@pytest.mark.parametrize("wrap", [as_it_is, per_rank])
def test_numbers_of_numpy_come_back_as_pythons(wrap: Any, tmp_path: Path) -> None:
    found = round_trip(tmp_path, NUMPY, wrap)
    assert found == PYTHON
    assert type(found[0]) is float
    assert type(found[1][1][0]) is int


@pytest.mark.parametrize("wrap", [as_it_is, per_rank])
@pytest.mark.parametrize(("value", "message"), UNREADABLE, ids=lambda value: type(value).__name__)
def test_what_could_not_be_read_again_is_refused_before_it_is_saved(
    value: Any, message: str, wrap: Any, tmp_path: Path
) -> None:
    save = make(tmp_path, stateful={"data": wrap(Keeper(value))})
    with pytest.raises(UsageError, match=f"^values that could be saved, but never be read again\\n  {message}"):
        save.save(1)
    assert committed_steps(tmp_path) == []
    save.close()


def test_all_of_them_are_named_at_once(tmp_path: Path) -> None:
    save = make(tmp_path, scheduler=Keeper(Settings()), stateful={"a": Keeper([1, Color.RED]), "b": Keeper(1)})
    with pytest.raises(UsageError, match="never be read again") as caught:
        save.save(1)
    assert "lr_scheduler.kept: a Settings" in str(caught.value)
    assert "a.kept.1: a Color" in str(caught.value)
    save.close()
