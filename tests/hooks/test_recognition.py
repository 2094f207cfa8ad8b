"""What is remembered of a model from one export to the next is forgotten as soon as the model changes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from shardsmith.hooks import EMA, HFExport, every
from shardsmith.hooks.live_directory import LiveDirectory, ModelFiles
from shardsmith.hooks.live_state import LiveState
from shardsmith.live.recognition import own_tensors
from tests.ranks import run_on_ranks


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(3, 5)
        self.down = nn.Linear(5, 3)
        self.register_buffer("seen", torch.zeros(2))
        self.register_buffer("angles", torch.ones(2), persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        return self.down(self.up(values))


class Model(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(Block(), Block())


def replace_parameter(model: Model) -> None:
    model[0].up.weight = nn.Parameter(torch.full((5, 3), 7.0))


def replace_memory(model: Model) -> None:
    model[0].up.weight.data = torch.full((5, 3), 7.0)


def grow(model: Model) -> None:
    model[0].up.weight.data = torch.full((6, 3), 7.0)


def replace_buffer(model: Model) -> None:
    model[1].register_buffer("seen", torch.full((3,), 7))


def hide_buffer(model: Model) -> None:
    model[1].register_buffer("seen", model[1].seen, persistent=False)


def show_buffer(model: Model) -> None:
    model[1]._non_persistent_buffers_set.clear()


def drop_parameter(model: Model) -> None:
    model[0].up.bias = None


def add_module(model: Model) -> None:
    model.append(Block())


def rename_module(model: Model) -> None:
    model.head = model[1]
    del model[1]


def swap_modules(model: Model) -> None:
    model[0], model[1] = model[1], model[0]


def tie(model: Model) -> None:
    model[1].up.weight = model[0].up.weight


def name_twice(model: Model) -> None:
    model.again = model[0]


def retype(model: Model) -> None:
    model.double()


def add_hook(model: Model) -> None:
    def drop(module: nn.Module, state: dict[str, Any], prefix: str, _: object) -> None:
        del state[f"{prefix}up.weight"], module

    model[0].register_state_dict_post_hook(drop)


CHANGES: list[Callable[[Model], None]] = [
    *(replace_parameter, replace_memory, grow, replace_buffer, hide_buffer, show_buffer, drop_parameter, add_module),
    *(rename_module, swap_modules, tie, name_twice, retype, add_hook),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_of_the_model_is_seen_by_the_next_export(tmp_path: Path, change: Callable[[Model], None]) -> None:
    model = Model()
    export = HFExport(tmp_path, model=model, when=every(1), dtype="original")
    for step in (1, 2):
        export.export(step)
    change(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    export.export(3)
    export.close()
    found = load_file(tmp_path / "step-3" / "model.safetensors")
    expected = model.state_dict()
    aliases = {"1.up.weight"} if change is tie else {n for n in expected if n.startswith("again.")}
    assert found.keys() == expected.keys() - aliases
    assert all(found[name].dtype == expected[name].dtype for name in found)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def state_of(model: nn.Module, ema: EMA | None = None) -> Callable[[], list[Any]]:
    files = ModelFiles(base=None, processor=None, extra={}, trust_remote_code=False)
    state = LiveState(model, ema, files, dtype="bfloat16", max_shard_size=None)
    (directory,) = LiveDirectory.choose("both" if ema else "main", "file")
    return lambda: [model.plan for model in state.models(directory)]


def are_same(one: list[Any], other: list[Any]) -> bool:
    return all(a is b for a, b in zip(one, other, strict=True))


def test_plans_are_made_once_while_the_model_trains(tmp_path: Path) -> None:
    run_on_ranks(run_plans_once, 2, tmp_path)


def run_plans_once() -> None:
    sharded = Model()
    for block in sharded:
        fully_shard(block)
    fully_shard(sharded)
    wrapped = Model()
    wrapped[0] = checkpoint_wrapper(wrapped[0])
    for model in (sharded, DistributedDataParallel(Model()), wrapped):
        ema = EMA(model)
        plans = state_of(model, ema)
        before = plans()
        assert len(before) == 2
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        ema.on_optimizer_step(1)
        assert are_same(before, plans())
    check_gathered(sharded)


def check_gathered(model: nn.Module) -> None:
    """After a forward alone FSDP2 keeps the weights of the root gathered: they are no shards."""
    plans = state_of(model)
    before = plans()
    with torch.no_grad():
        model(torch.ones(1, 3))
    after = plans()
    assert [plan.specs for plan in before] == [plan.specs for plan in after]
    assert dist.get_world_size() == 2


def test_an_average_of_other_tensors_is_another_plan() -> None:
    model = Model()
    ema = EMA(model)
    plans = state_of(model, ema)
    before = plans()
    assert are_same(before, plans())
    ema._average = {name: tensor.clone() for name, tensor in ema._average.items()}
    assert not are_same(before, plans())


def test_what_hooks_make_is_looked_at_every_time() -> None:
    model = Model()
    model[0].register_state_dict_pre_hook(lambda *_: None)
    assert own_tensors(model, model.state_dict()) is None
    plans = state_of(model)
    assert not are_same(plans(), plans())


def test_a_state_dict_of_other_tensors_is_not_taken_for_the_models_own() -> None:
    model = Model()
    state = model.state_dict()
    own = own_tensors(model, state)
    assert own is not None
    assert own["0.up.weight"] is model[0].up.weight
    assert own["1.seen"] is model[1].seen
    assert own_tensors(model, {**state, "0.up.bias": state["0.up.bias"].clone()}) is None
    assert own_tensors(model, {**state, "0.up.weight": state["0.up.weight"].t()}) is None
    assert own_tensors(model, {**state, "other": state["0.up.bias"]}) is None


def test_what_is_remembered_keeps_no_memory() -> None:
    model = Model()
    plans = state_of(model)
    plans()
    old = weakref.ref(model[0].up.weight)
    model[0].up.weight = nn.Parameter(torch.zeros(5, 3))
    gc.collect()
    assert old() is None
