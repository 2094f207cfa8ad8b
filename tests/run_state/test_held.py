"""What a rank holds of a state dict has the keys, paths and order that torch gives it, whatever is nested in it."""

from __future__ import annotations

import gc
import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint._nested_dict import flatten_state_dict

from shardsmith.ground.garbage import without_collection
from shardsmith.run_state.held import Held, KnownEntries
from tests.ranks import run_on_ranks
from tests.run_state.test_save_layouts import tensors_of_every_layout

ONE = torch.ones(2)


@pytest.mark.parametrize(
    "state",
    [
        {"weight": ONE, "step": 3, "none": None, "": 1.5},
        {"optimizer": {"state.w.exp_avg": ONE, "param_groups.w.betas": (0.9, 0.95), "param_groups.w.lr": 1e-3}},
        {"a": {"b": {"c": ONE, "d": [1, 2]}, "list": [ONE, {"x": ONE}], "plain": [1, 2]}, "e": [[1], [ONE]]},
        {"numbered": {0: ONE, 1: {2: "x"}}, 7: ONE, "empty": {}, "tuple": (ONE, 1)},
        OrderedDict(model=OrderedDict(w=nn.Parameter(ONE), b=ONE), words=OrderedDict(a="x", b=b"y")),
    ],
)
def test_a_state_is_flattened_as_torch_does_it(state: dict[Any, Any]) -> None:
    flat, paths = flatten_state_dict(dict(state))
    held = KnownEntries().hold(state)
    assert [entry.key for entry in held.entries] == list(flat)
    assert [entry.path for entry in held.entries] == [tuple(path) for path in paths.values()]
    for value, expected in zip(held.leaves, flat.values(), strict=True):
        assert torch.equal(value, expected) if isinstance(expected, torch.Tensor) else value is expected


def test_two_things_under_one_flat_key_are_refused() -> None:
    with pytest.raises(ValueError, match=r"duplicated flatten key a\.b"):
        KnownEntries().hold({"a": {"b": ONE}, "a.b": ONE})


VALUES = [
    1,
    None,
    (1, 2),
    [1, "x"],
    [ONE],
    {"b": ONE},
    {"b": 1.5, "c": [ONE, 2]},
    {0: ONE},
    {},
    ONE,
    ONE.clone(),
    ONE[:1],
    ONE.double(),
    nn.Parameter(ONE),
    torch.ones(()),
    torch.ones(0, 3),
    torch.ones(2, 3).t(),
]
"""What can come in the place of each other from one state to the next."""


@pytest.mark.parametrize("seed", range(20))
def test_a_state_is_held_as_if_it_were_the_first_whatever_came_before(seed: int) -> None:
    chance, known = random.Random(seed), KnownEntries()
    state: dict[str, Any] = {}
    for _ in range(60):
        name = chance.choice(["a", "w", "opt", "x"])
        if chance.random() < 0.2:
            state.pop(name, None)
        else:
            part = {str(i): chance.choice(VALUES) for i in range(chance.randrange(3))}
            state[name] = chance.choice([part, chance.choice(VALUES)])
        assert_held_alike(known.hold(state), KnownEntries().hold(state))


def assert_held_alike(one: Held, other: Held) -> None:
    assert one.entries == other.entries
    assert [*map(id, one.leaves)] == [*map(id, other.leaves)]
    for i, entry in enumerate(one.entries):
        if entry.shape is not None:
            ours, theirs = one.values(i), other.values(i)
            assert [box.sizes for box in entry.boxes] == [tuple(value.shape) for value in ours]
            for mine, expected in zip(ours, theirs, strict=True):
                assert (mine.dtype, mine.stride()) == (expected.dtype, expected.stride())
                assert mine.data_ptr() == expected.data_ptr() or not mine.numel()


def test_sharded_tensors_too(tmp_path: Path) -> None:
    run_on_ranks(run_resharded, 4, tmp_path)


def run_resharded() -> None:
    layouts = [*tensors_of_every_layout().values()]
    known = KnownEntries()
    for shift in (0, 0, 1, 40, 300):  # the same once more; then under each key a tensor that is sharded in another way
        state = {f"t{i}": layouts[(i + shift) % len(layouts)] for i in range(len(layouts))}
        with torch.no_grad():
            assert_held_alike(known.hold(state), KnownEntries().hold(state))


def test_two_keys_that_become_one_are_refused_whenever_they_do() -> None:
    known = KnownEntries()
    known.hold({"a": {"b": ONE}, "a.c": ONE})
    with pytest.raises(ValueError, match=r"duplicated flatten key a\.b"):
        known.hold({"a": {"b": ONE}, "a.b": ONE})
    assert len(known.hold({"a": {"b": ONE}, "a.c": ONE}).entries) == 2


def test_what_is_made_without_collection_is_not_looked_through_after_it() -> None:
    with without_collection():
        made = [[number] for number in range(50_000)]
    assert gc.isenabled()
    assert gc.get_count()[0] < 10_000 < len(made)


def test_frozen_objects_are_not_counted_where_little_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def count() -> int:
        raise AssertionError("this walks through all that the program has frozen")

    monkeypatch.setattr(gc, "get_freeze_count", count)
    with without_collection():
        made = [[number] for number in range(5_000)]
    assert gc.isenabled()
    assert len(made) == 5_000
