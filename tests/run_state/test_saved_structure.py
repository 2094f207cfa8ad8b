"""What users save beside the model comes back whole, whatever the object that asks for it looks like at its start."""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchdata.stateful_dataloader import StatefulDataLoader

from shardsmith.errors import MismatchError, UsageError
from shardsmith.hooks import Hooks, ShardedSave, every, per_rank


class Keeper:
    """A state that a user writes; its dict is the state."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state_dict: Any) -> None:
        self.state = state_dict


ONE, THREE = torch.ones(1), torch.arange(3.0)
CASES: list[tuple[Any, Any]] = [  # in mid-run, at the start
    ({"metrics": {"loss": 1}}, {"metrics": {}}),
    ({"metrics": {"loss": 1}}, {"metrics": None}),
    ({"seen": [1, 2]}, {"seen": []}),
    ({"seen": [{"a": 1}, {"b": [2, [3]]}]}, {"seen": []}),
    ({"seen": [[1, 2], (3,)]}, {"seen": None}),
    ({"seen": [ONE, THREE]}, {"seen": [torch.zeros(1)]}),
    ({"a": 1, "b": {"c": {"d": THREE}}}, {"a": 0}),
    ({"a": 1, "b": 2}, {}),
    ({"history": THREE}, {"history": torch.zeros(0)}),
    ({"history": THREE}, {"history": None}),
    ({"history": None}, {"history": torch.zeros(1)}),
    ({"flag": True, "empty": {}}, {"flag": False, "empty": {}}),
    ({0: {"step": 7}, 1: {"step": THREE}}, {}),
    ({"at": {-3: 1, 80: 2}}, {"at": {-3: 0, 80: 0}}),
    ({"at": [{5: 1}], "7": 7}, {"at": None}),
]


def plain(state: Any) -> Any:
    """The same with lists for tensors, to be compared."""
    if isinstance(state, dict):
        return {name: plain(value) for name, value in state.items()}
    if isinstance(state, list):
        return [plain(value) for value in state]
    return state.tolist() if isinstance(state, torch.Tensor) else state


def resumed(directory: Path, saved: Any, fresh: Any) -> Any:
    """``fresh`` after a resume of what ``saved`` was."""
    for thing, is_new in ((saved, True), (fresh, False)):
        save = ShardedSave(directory, model=nn.Linear(2, 2), when=every(1), stateful={"x": thing})
        if is_new:
            save.save(1)
        else:
            assert save.resume() == 1
        save.close()
    return fresh


@pytest.mark.parametrize(("saved", "fresh"), CASES, ids=str)
def test_a_state_that_has_grown_comes_back_whole(saved: Any, fresh: Any, tmp_path: Path) -> None:
    assert plain(resumed(tmp_path, Keeper(saved), Keeper(fresh)).state) == plain(saved)
    found: Keeper = Keeper(fresh)
    for thing in (Keeper(saved), found):
        save = ShardedSave(tmp_path / "one", model=nn.Linear(2, 2), when=every(1), stateful={"x": per_rank(thing)})
        save.resume() if thing is found else save.save(1)
        save.close()
    assert plain(found.state) == plain(saved)


def test_containers_keep_their_kind(tmp_path: Path) -> None:
    found = resumed(tmp_path, Keeper({"n": defaultdict(int, a=1)}), Keeper({"n": defaultdict(int)})).state
    assert found["n"]["new"] == 0
    assert found["n"]["a"] == 1


def test_a_key_that_was_not_saved_is_an_error(tmp_path: Path) -> None:
    fresh = Keeper({"a": 0, "new": {"deep": 0}})
    with pytest.raises(MismatchError, match=r"x\.new\.deep: not in the checkpoint"):
        resumed(tmp_path, Keeper({"a": 1}), fresh)
    assert fresh.state == {"a": 0, "new": {"deep": 0}}


@pytest.mark.parametrize("state", [{1.5: 1}, {"a": {(1, 2): 3}}, {1: 1, "1": 2}, {True: 1}])
def test_keys_that_could_not_come_back_are_refused(state: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="keys of what is saved are strings or whole numbers"):
        resumed(tmp_path, Keeper(state), Keeper({}))


def test_the_milestones_of_a_scheduler_come_back(tmp_path: Path) -> None:
    def make() -> Any:
        return torch.optim.lr_scheduler.MultiStepLR(torch.optim.SGD([nn.Parameter(ONE)], lr=1.0), [2, 30])

    scheduler, fresh = make(), make()
    for thing in (scheduler, fresh):
        save = ShardedSave(tmp_path, model=nn.Linear(2, 2), when=every(1), scheduler=thing)
        save.resume() if thing is fresh else save.save(1)
        save.close()
    assert fresh.milestones == Counter({2: 1, 30: 1})


def test_another_optimizer_beside_the_first_gets_its_state_back(tmp_path: Path) -> None:
    def make() -> torch.optim.Optimizer:
        return torch.optim.AdamW([nn.Parameter(torch.ones(3))], lr=0.1)

    saved = make()
    saved.param_groups[0]["params"][0].grad = torch.ones(3)
    saved.step()
    fresh = resumed(tmp_path, saved, make())
    assert torch.equal(fresh.state_dict()["state"][0]["exp_avg"], saved.state_dict()["state"][0]["exp_avg"])


def test_another_model_beside_the_first_is_compared_with_what_was_saved(tmp_path: Path) -> None:
    fresh = nn.Linear(3, 3)
    before = fresh.weight.clone()
    with pytest.raises(MismatchError, match=r"x\.weight: saved \(2, 3\)"):
        resumed(tmp_path, nn.Linear(3, 2), fresh)
    assert torch.equal(fresh.weight, before)


def run_loader(directory: Path, last: int, workers: int) -> list[list[int]]:
    """The batches of one process, whose loader is passed as it is."""
    warnings.filterwarnings("ignore", "'set_vital' is deprecated", UserWarning)  # of torch, by torchdata
    torch.manual_seed(5)
    loader = StatefulDataLoader(range(24), batch_size=2, shuffle=True, num_workers=workers)
    hooks = Hooks(ShardedSave(directory, model=nn.Linear(2, 2), when=every(2), stateful={"data": loader}))
    step, batches = hooks.resume(), []
    for batch in loader:
        step += 1
        batches.append(batch.tolist())
        hooks.step(step)
        if step == last:
            break
    hooks.close()
    return batches


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_of_one_process_goes_on_where_it_was(workers: int, tmp_path: Path) -> None:
    straight = run_loader(tmp_path / "straight", 8, workers)
    assert run_loader(tmp_path / "run", 4, workers) + run_loader(tmp_path / "run", 8, workers) == straight
