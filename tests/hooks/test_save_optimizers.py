"""Every optimizer of torch: a run in parts ends as the uninterrupted one, or the save says what to write instead."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from shardsmith.errors import UsageError
from shardsmith.hooks import Hooks, ShardedSave, last
from shardsmith.sharding.local_boxes import local
from tests.ranks import run_on_ranks

OPTIMIZERS = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
)
REFUSED = {"LBFGS", "SparseAdam"}
"""One has no state by parameter, the other no step with the gradients that torch makes up."""


def train(name: str, run: Path, until: int, *, apart: bool) -> list[Tensor]:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(6, 8, bias=False), nn.GELU(), nn.Linear(8, 4, bias=False))
    if name == "SparseAdam":
        model = nn.EmbeddingBag(10, 4, sparse=True)
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.01)
    save = ShardedSave(
        run,
        model=model,
        when=last(),
        **({"stateful": {"own_optimizer": optimizer}} if apart else {"optimizer": optimizer}),
    )
    with Hooks(save) as hooks:
        step = hooks.resume()
        while step < until:
            seed = torch.Generator().manual_seed(step)
            inputs = (
                torch.randint(10, (5, 3), generator=seed) if name == "SparseAdam" else torch.randn(5, 6, generator=seed)
            )

            def closure(inputs: Tensor = inputs) -> Tensor:
                optimizer.zero_grad()
                loss: Tensor = model(inputs).square().mean()
                loss.backward()
                return loss

            if name != "LBFGS":
                closure()
            optimizer.step(closure if name == "LBFGS" else None)
            step += 1
            hooks.step(step)
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_in_parts_ends_as_the_uninterrupted_one(name: str, tmp_path: Path) -> None:
    apart = name in REFUSED
    expected = train(name, tmp_path / "straight", 6, apart=apart)
    train(name, tmp_path / "parts", 3, apart=apart)
    found = train(name, tmp_path / "parts", 6, apart=apart)
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_an_optimizer_that_torch_cannot_take_apart_is_refused_with_what_to_write(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"pass stateful=\{'own_optimizer': optimizer\}"):
        train(name, tmp_path, 1, apart=False)
    assert not list(tmp_path.iterdir())


class PartlyUsed(nn.Module):
    """One of its layers never gets a gradient, as the pooler of a BERT that is trained on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(6, 4)
        self.pooler = nn.Linear(4, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden: Tensor = self.used(inputs)
        return hidden


def train_partly(run: Path, until: int, sharding: str) -> tuple[list[Tensor], set[str]]:
    torch.manual_seed(0)
    model: nn.Module = PartlyUsed()
    if sharding == "fsdp2":
        fully_shard(model)
    elif sharding == "fsdp1":
        model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    elif sharding == "ddp":
        model = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    with Hooks(ShardedSave(run, model=model, optimizer=optimizer, when=last())) as hooks:
        step = hooks.resume()
        while step < until:
            model(torch.randn(5, 6, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            hooks.step(step)
    stateful = {name for name, parameter in model.named_parameters() if parameter in optimizer.state}
    return [local(parameter).detach().clone() for parameter in model.parameters()], stateful


def run_partly(directory: Path, sharding: str) -> None:
    expected, stateful = train_partly(directory / "straight", 6, sharding)
    train_partly(directory / "parts", 3, sharding)
    found, stateful_now = train_partly(directory / "parts", 6, sharding)
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
    assert stateful_now == stateful


def test_a_parameter_without_a_gradient_has_no_state_after_a_resume_either(tmp_path: Path) -> None:
    run_partly(tmp_path, "none")


@pytest.mark.parametrize("sharding", ["fsdp2", "fsdp1", "ddp"])
def test_so_it_is_on_several_ranks(sharding: str, tmp_path: Path) -> None:
    run_on_ranks(run_partly, 2, tmp_path, tmp_path, sharding)


def train_thawed(run: Path, until: int, sharding: str, *, backward_first: bool = False) -> tuple[list[Tensor], int]:
    """A layer trains at steps 2 and 3, and again from step 6 on; in between, as at a resume after 4, it is frozen."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 4))
    if sharding == "fsdp2":
        fully_shard(model)
    elif sharding == "fsdp1":
        model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    elif sharding == "ddp":
        model = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    layer = [parameter for name, parameter in model.named_parameters() if ("0." in name.rpartition("module.")[2])]
    if backward_first:  # as a run that measures its memory before it resumes
        model(torch.ones(5, 6)).sum().backward()
    else:
        for parameter in layer:
            parameter.requires_grad_(False)
    with Hooks(ShardedSave(run, model=model, optimizer=optimizer, when=last())) as hooks:
        step = hooks.resume()
        optimizer.zero_grad()
        while step < until:
            step += 1
            for parameter in layer:
                parameter.requires_grad_(step in (2, 3) or step >= 6)
            model(torch.randn(5, 6, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            hooks.step(step)
    states = sum(bool(optimizer.state.get(parameter)) for parameter in model.parameters())
    return [local(parameter).detach().clone() for parameter in model.parameters()], states


def run_thawed(directory: Path, sharding: str) -> None:
    for backward_first in (False, True):
        place = directory / str(backward_first)
        expected = train_thawed(place / "straight", 8, sharding)
        train_thawed(place / "parts", 4, sharding)
        found = train_thawed(place / "parts", 8, sharding, backward_first=backward_first)
        assert found[1] == expected[1]
        assert all(torch.equal(one, other) for one, other in zip(expected[0], found[0], strict=True))


def test_the_state_of_a_parameter_that_is_frozen_or_has_a_gradient_comes_back(tmp_path: Path) -> None:
    run_thawed(tmp_path, "none")


@pytest.mark.parametrize("sharding", ["fsdp2", "fsdp1", "ddp"])
def test_so_it_does_on_several_ranks(sharding: str, tmp_path: Path) -> None:
    run_on_ranks(run_thawed, 2, tmp_path, tmp_path, sharding)
