"""Optimizers of very many parameters take up a state in a time that grows as their number."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from shardsmith.run_state.known_state import FLAT_OPTIMIZER
from shardsmith.run_state.optimizers import finding_parameters_fast


class Compared:
    """A name that counts how often it is compared."""

    count = 0

    def __init__(self, name: str) -> None:
        self.name = name

    def __hash__(self) -> int:
        return hash(self.name)

    def __eq__(self, other: object) -> bool:
        Compared.count += 1
        return isinstance(other, Compared) and self.name == other.name


def trained(*, fused: bool, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and an optimizer with two groups that has done a step."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    groups = [{"params": model[0].parameters(), "lr": 0.1 * seed}, {"params": model[1].parameters()}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, fused=fused)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_each_parameter_is_looked_up_and_not_searched_for() -> None:
    parameters = [nn.Parameter(torch.ones(1)) for _ in range(500)]
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones(1)
    optimizer.step()
    state = optimizer.state_dict()
    names = [Compared(f"{number}") for number in range(500)]
    named = {name: state["state"][number] for number, name in enumerate(names)}
    group = {**state["param_groups"][0], "params": [Compared(name.name) for name in names]}
    Compared.count = 0
    with finding_parameters_fast([optimizer]):
        optimizer.load_state_dict({"state": named, "param_groups": [group]})
    assert Compared.count < 20 * 500, "a search compares 375,000 times"


def test_what_is_loaded_is_what_torch_loads_alone() -> None:
    for fused in (False, True):
        saved = get_optimizer_state_dict(*trained(fused=fused, seed=1), options=FLAT_OPTIMIZER)
        (model, plain), (_, fast) = (trained(fused=fused, seed=2) for _ in range(2))
        other = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        set_optimizer_state_dict(model, plain, dict(saved), options=FLAT_OPTIMIZER)
        fast.param_groups[0]["params"][:] = list(other[0].parameters())
        fast.param_groups[1]["params"][:] = list(other[1].parameters())
        fast.state.clear()
        with finding_parameters_fast([fast]):
            set_optimizer_state_dict(other, fast, dict(saved), options=FLAT_OPTIMIZER)
        expected, found = plain.state_dict(), fast.state_dict()
        assert found["param_groups"] == expected["param_groups"]
        for number, state in expected["state"].items():
            assert all(torch.equal(value, found["state"][number][key]) for key, value in state.items())
        assert not fast._optimizer_load_state_dict_pre_hooks
