"""What one save finds out is used by the next one, and never instead of what has changed since."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

from shardsmith.hooks import EMA, ShardedSave, at
from shardsmith.run_state.save import SaveInProgress
from tests.ranks import run_on_ranks

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


@dataclass
class Run:
    """A run of which parts are replaced between two saves."""

    directory: Path
    options: dict[str, Any]
    model: nn.Module = field(init=False)
    optimizer: AdamW = field(init=False)
    ema: EMA = field(init=False)
    save: ShardedSave = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 4))
        self.model.register_parameter("spare", nn.Parameter(torch.ones(3), requires_grad=False))
        for part in (self.model[0], self.model[2]):
            fully_shard(part)
        self.optimizer = AdamW([p for p in self.model.parameters() if p.requires_grad], lr=0.1)
        self.ema = EMA(self.model, decay=0.5)
        self.save = ShardedSave(
            self.directory, model=self.model, optimizer=self.optimizer, ema=self.ema, when=at(10**9), **self.options
        )

    def train(self) -> None:
        self.model(torch.randn(3, 8)).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update()

    def state(self) -> dict[str, Any]:
        """By torch's own functions."""
        return {
            **get_model_state_dict(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer, options=FLAT),
            "ema_model": self.ema.model_state_dict(),
        }


def unchanged(run: Run) -> None:
    """Nothing but values."""


def change_group(run: Run) -> None:
    run.optimizer.param_groups[0] |= {"lr": 0.025, "betas": [0.5, 0.75], "note": "new"}


def make_lr_a_tensor(run: Run) -> None:
    run.optimizer.param_groups[0]["lr"] = torch.tensor(0.3)


def empty_optimizer(run: Run) -> None:
    run.optimizer.state.clear()


def load_optimizer(run: Run) -> None:
    run.optimizer.load_state_dict(run.optimizer.state_dict())


def replace_parameter(run: Run) -> None:
    """By one of another shape and dtype."""
    run.model.spare = nn.Parameter(torch.full((5,), 2.5, dtype=torch.float64), requires_grad=False)


def replace_buffer(run: Run) -> None:
    run.model[1].running_mean = torch.arange(6, dtype=torch.float32) + 0.5


def add_buffer(run: Run) -> None:
    run.model[2].register_buffer("scale", torch.tensor([1.0, 3.0]))


def resume(run: Run) -> None:
    run.save.resume()


@torch.no_grad()
def replace_average(run: Run) -> None:
    """Other tensors hold the averages, with other values."""
    for name, tensor in run.ema._average.items():
        run.ema._average[name] = tensor + 1


CHANGES = [
    unchanged,
    change_group,
    make_lr_a_tensor,
    empty_optimizer,
    load_optimizer,
    replace_buffer,
    add_buffer,
    resume,
    replace_average,
    replace_parameter,
]


@pytest.mark.parametrize("options", [{}, {"staging": "overlap"}, {"async_mode": "disabled"}], ids=str)
def test_a_save_holds_what_the_run_holds_whatever_has_changed_since_the_last(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    run_on_ranks(run_changes, 2, tmp_path, tmp_path, options)


def run_changes(directory: Path, options: dict[str, Any]) -> None:
    step = 0
    for number, change in enumerate(CHANGES):
        run = Run(directory / f"{number}-{change.__name__}", options)
        for act in (unchanged, unchanged, change, unchanged):
            if act is not empty_optimizer:
                run.train()
            act(run)
            step += 1
            run.save.save(step)
            expected = run.state()
            assert_holds(run.save.saving(step).result(), expected)
        run.save.close()


def assert_holds(checkpoint: Path, expected: dict[str, Any]) -> None:
    loaded = emptied(expected)
    dcp.load(loaded, checkpoint_id=checkpoint)
    one, other = flat(loaded), flat(expected)
    saved = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata.keys()
    ours = {key for key in saved if key.split(".")[0] not in ("ema_state", "rng", "train_state")}
    assert one.keys() == other.keys() == ours
    for key, value in other.items():
        if isinstance(value, Tensor):
            assert value.dtype == one[key].dtype
            assert torch.equal(local(value), local(one[key])), key
        else:
            assert value == one[key], key


def emptied(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: emptied(value) for key, value in state.items()}
    return torch.zeros_like(state) if isinstance(state, Tensor) else state


def flat(state: dict[str, Any]) -> dict[str, Any]:
    return dict(torch.distributed.checkpoint._nested_dict.flatten_state_dict(state)[0])


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def test_from_the_second_save_on_the_training_waits_for_one_round(tmp_path: Path) -> None:
    run_on_ranks(run_rounds, 2, tmp_path, tmp_path)


def run_rounds(directory: Path) -> None:
    run = Run(directory / "run", {"compare_replicas": "never"})
    rounds: list[str] = []
    exchange = run.save._ranks._exchange

    def counted(phase: str, *args: Any, **options: Any) -> Any:
        rounds.append(phase)
        return exchange(phase, *args, **options)

    run.save._ranks._exchange = counted  # type: ignore[method-assign]
    begin: Callable[..., None] = SaveInProgress.begin
    seen: list[list[str]] = []

    def watched(job: SaveInProgress, *args: Any, **options: Any) -> None:
        rounds.clear()
        begin(job, *args, **options)
        seen.append([*rounds])

    SaveInProgress.begin = watched  # type: ignore[method-assign]
    for step in (1, 2, 3):
        run.train()
        run.save.save(step)
        run.save.saving(step).result()
        if dist.get_rank() == 0 and step == 2:  # one rank alone holds more: all of them have to agree again
            run.model[2].register_buffer("own", torch.ones(3))
    run.save.close()
    assert len(seen[0]) > 1
    assert seen[1] == ["collecting step-2"]
    assert [phase.split()[0] for phase in seen[2]] == ["collecting", "collecting", "staging", "staging"]
    assert_holds_own(directory / "run" / "step-3")


def assert_holds_own(checkpoint: Path) -> None:
    state = {"2.own": torch.zeros(3)}
    dcp.load(state, checkpoint_id=checkpoint)
    assert torch.equal(state["2.own"], torch.ones(3))
