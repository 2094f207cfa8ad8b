"""What a rank holds of a state dict has the keys, paths and order that torch gives it, whatever is nested in it."""

from __future__ import annotations

import gc
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint._nested_dict import flatten_state_dict

from shardsmith.ground.garbage import without_collection
from shardsmith.run_state.held import hold

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
    held = hold(state)
    assert [entry.key for entry in held.entries] == list(flat)
    assert [entry.path for entry in held.entries] == [tuple(path) for path in paths.values()]
    for (value,), expected in zip(held.values, flat.values(), strict=True):
        assert torch.equal(value, expected) if isinstance(expected, torch.Tensor) else value is expected


def test_two_things_under_one_flat_key_are_refused() -> None:
    with pytest.raises(ValueError, match=r"duplicated flatten key a\.b"):
        hold({"a": {"b": ONE}, "a.b": ONE})


def test_what_is_made_without_collection_is_not_looked_through_after_it() -> None:
    with without_collection():
        made = [[number] for number in range(50_000)]
    assert gc.isenabled()
    assert gc.get_count()[0] < 10_000 < len(made)
