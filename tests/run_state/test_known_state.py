"""The state that is made up without torch is what torch gives, whatever happens to model and optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.optim import SGD, AdamW, Optimizer

from shardsmith.run_state import known_state
from shardsmith.run_state.known_state import KnownState, StateDicts


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("transient", torch.ones(2), persistent=False)


def step(model: nn.Module, optimizers: list[Optimizer]) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for optimizer in optimizers:
        optimizer.step()


def assert_as_torch(found: StateDicts, model: nn.Module, optimizers: list[Optimizer]) -> None:
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    expected: list[dict[str, Any]] = [
        dict(get_model_state_dict(model)),
        dict(get_optimizer_state_dict(model, optimizers, options=flat)),
    ]
    for ours, theirs in zip([found.model, found.optimizer], expected, strict=True):
        assert [*ours] == [*theirs]
        for key, value in theirs.items():
            assert torch.equal(ours[key], value) if isinstance(value, Tensor) else ours[key] == value, key


def add_group(model: Tied, optimizers: list[Optimizer]) -> None:
    model.extra = nn.Parameter(torch.ones(3))
    optimizers[0].add_param_group({"params": [model.extra], "lr": 7.0})


def replace_parameter(model: Tied, optimizers: list[Optimizer]) -> None:
    model.norm.weight = nn.Parameter(torch.full((4,), 5.0))
    optimizers[:] = [SGD(model.parameters(), lr=0.5)]


def load_optimizer(model: Tied, optimizers: list[Optimizer]) -> None:  # noqa: ARG001
    for optimizer in optimizers:
        optimizer.load_state_dict({**optimizer.state_dict()})


def change_options(model: Tied, optimizers: list[Optimizer]) -> None:  # noqa: ARG001
    for group in optimizers[0].param_groups:
        group |= {"lr": torch.tensor(3.0), "weight_decay": 0.0}


def unchanged(model: Tied, optimizers: list[Optimizer]) -> None:
    """Nothing but values."""


CHANGES: list[Callable[[Tied, list[Optimizer]], None]] = [
    unchanged,
    change_options,
    load_optimizer,
    add_group,
    replace_parameter,
]


def optimizers_of(kind: str, model: nn.Module) -> list[Optimizer]:
    parameters = [*model.parameters()]
    if kind == "two":
        return [AdamW(parameters[:1]), SGD(parameters[1:], lr=0.1, momentum=0.9)]
    return [AdamW([{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.2}], amsgrad=True)]


@pytest.mark.parametrize("kind", ["groups", "two"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_made_up_is_what_torch_gives(kind: str, change: Callable[[Tied, list[Optimizer]], None]) -> None:
    model = Tied()
    optimizers = optimizers_of(kind, model)
    step(model, optimizers)
    known = KnownState(model, optimizers)
    for act in (unchanged, change, unchanged):
        act(model, optimizers)
        step(model, optimizers)
        assert_as_torch(known.state_dicts(), model, optimizers)


def test_torch_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    real = known_state.ask_torch
    monkeypatch.setattr(known_state, "ask_torch", lambda *args: asked.append(None) or real(*args))
    model = Tied()
    optimizers = optimizers_of("groups", model)
    known = KnownState(model, optimizers)
    for _ in range(3):
        step(model, optimizers)
        assert torch.equal(known.state_dicts().model["embed.weight"], model.embed.weight)
    assert len(asked) == 1


def test_where_hooks_save_other_tensors_torch_is_asked_every_time() -> None:
    model = nn.Linear(2, 2)

    def double(module: nn.Module, state: dict[str, Any], *rest: Any) -> None:  # noqa: ARG001
        state["weight"] = state["weight"] * 2

    model._register_state_dict_hook(double)
    known = KnownState(model, [])
    for value in (1.0, 2.0):
        nn.init.constant_(model.weight, value)
        assert torch.equal(known.state_dicts().model["weight"], torch.full((2, 2), 2 * value))
