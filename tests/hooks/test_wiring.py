"""Hooks that do not fit together, or not to the model, are refused before the first step: on all ranks, in seconds."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.optim.lr_scheduler import ChainedScheduler, CosineAnnealingLR, StepLR

from shardsmith.errors import RankError, RankFailedError, RanksDisagreeError, RankTimeoutError, UsageError
from shardsmith.ground.meeting import START_SECS
from shardsmith.hooks import EMA, HFExport, Hook, Hooks, ShardedSave, every, last, latest
from shardsmith.hooks.folder_save import FolderSave
from shardsmith.hooks.record import Recorder
from shardsmith.manager import ShardedCheckpointManager
from shardsmith.manifest.checkpoints import committed_steps
from tests.ranks import run_on_ranks

Make = Callable[[Path], Hooks]


def linear() -> nn.Linear:
    return nn.Linear(4, 4)


def not_attached(directory: Path) -> Hooks:
    model = linear()
    return Hooks(ShardedSave(directory, model=model, ema=EMA(model), when=every(1)))


def exported_only(directory: Path) -> Hooks:
    model = linear()
    return Hooks(HFExport(directory, model=model, ema=EMA(model), when=every(1)))


def of_another_model(directory: Path) -> Hooks:
    ema = EMA(linear())
    return Hooks(ema, ShardedSave(directory, model=linear(), ema=ema, when=every(1)))


def two_exports(directory: Path) -> Hooks:
    model = linear()
    return Hooks(
        HFExport(directory, model=model, when=every(1)), HFExport(directory / "x" / "..", model=model, when=every(2))
    )


def save_and_export(directory: Path) -> Hooks:
    model = linear()
    return Hooks(ShardedSave(directory, model=model, when=every(1)), HFExport(directory, model=model, when=every(1)))


def export_into_a_step(directory: Path) -> Hooks:
    model = linear()
    save = ShardedSave(directory, model=model, when=every(1), keep=latest(1))
    return Hooks(save, HFExport(directory / "step-7" / "hf", model=model, when=every(1)))


def on_the_meta_device(directory: Path) -> Hooks:
    with torch.device("meta"):
        model = linear()
    return Hooks(ShardedSave(directory, model=model, when=every(1)))


def lazy(directory: Path) -> Hooks:
    return Hooks(ShardedSave(directory, model=nn.LazyLinear(3), when=every(1)))


def module_replaced(directory: Path) -> Hooks:
    model = nn.Sequential(linear(), linear())
    ema = EMA(model)
    model[1] = linear()
    return Hooks(ema, ShardedSave(directory, model=model, ema=ema, when=every(1)))


def parameter_added(directory: Path) -> Hooks:
    model = nn.Sequential(linear())
    model[0].weight.requires_grad_(False)
    ema = EMA(model)
    model[0].weight.requires_grad_(True)
    model.append(linear())
    return Hooks(ema, ShardedSave(directory, model=model, ema=ema, when=every(1)))


UNFIT: dict[str, tuple[Make, str]] = {
    "an average for saves only": (not_attached, r"ShardedSave was given an EMA that is not attached.*Hooks\(ema, "),
    "an average for exports only": (exported_only, "HFExport was given an EMA that is not attached"),
    "an average of another model": (of_another_model, "ShardedSave was given an EMA of another model"),
    "two exports in a place": (two_exports, "HFExport and HFExport both publish step directories in"),
    "save and export in a place": (save_and_export, "ShardedSave and HFExport both publish"),
    "an export in a checkpoint": (export_into_a_step, "publish into each other's step-7, which is written as a whole"),
    "a model without values": (on_the_meta_device, "2 parameters of Linear have no values yet, such as weight: .*meta"),
    "a lazy model": (lazy, "2 parameters of LazyLinear have no values yet"),
    "a module that is not averaged": (module_replaced, "1.weight was replaced after EMA was made; 1.bias was replaced"),
    "what is new": (parameter_added, r"0.weight was added, or unfrozen, after EMA was made; 1.weight.*; 1.bias"),
}


@pytest.mark.parametrize("case", UNFIT)
@pytest.mark.parametrize("first", ["resume", "step"])
def test_hooks_that_do_not_fit_together_are_refused_before_anything_happens(
    case: str, first: str, tmp_path: Path
) -> None:
    make, message = UNFIT[case]
    hooks = make(tmp_path)
    with pytest.raises(UsageError, match=message):
        hooks.resume() if first == "resume" else hooks.step(1)
    hooks.close(broken_off=True)
    assert committed_steps(tmp_path) == []


def test_hooks_that_have_ended_say_so(tmp_path: Path) -> None:
    model = linear()
    save = ShardedSave(tmp_path, model=model, when=every(1))
    with Hooks(save) as hooks:
        hooks.step(1)
    hooks.close()  # once more is fine
    with pytest.raises(UsageError, match=r"step 2 after close\(\): these hooks have ended"):
        hooks.step(2)
    with pytest.raises(UsageError, match=r"resume\(\) after close\(\)"):
        hooks.resume()
    again = Hooks(save)
    with pytest.raises(UsageError, match="this hook was closed: make a new one"):
        again.step(2)
    assert committed_steps(tmp_path) == [1]


@pytest.mark.parametrize("begin", [Hooks.resume, lambda hooks: hooks.step(1)])
def test_a_hook_that_is_added_late_is_refused(begin: Callable[[Hooks], Any]) -> None:
    hooks = Hooks()
    begin(hooks)
    with pytest.raises(UsageError, match=r"this EMA comes too late: add hooks before resume\(\) and the first step"):
        hooks.add(EMA(linear()))


@pytest.mark.parametrize("within", ["step-1", "step-1/more"])
@pytest.mark.parametrize("kind", [ShardedSave, HFExport])
def test_a_step_is_no_directory_for_steps(kind: Any, within: str, tmp_path: Path) -> None:
    hooks = saved_until(tmp_path, 1)
    hooks.close(broken_off=True)
    with pytest.raises(UsageError, match=r"the directory of one step, .*: give the directory that the steps are in"):
        kind(tmp_path / within, model=linear(), when=every(1))


def test_a_save_in_flight_is_the_one_that_is_resumed(tmp_path: Path) -> None:
    save = ShardedSave(tmp_path, model=linear(), when=every(5))
    save.save(3)
    assert save.resume() == 3
    save.close()


def test_an_average_of_the_wrapped_or_inner_model_is_one_of_the_model(tmp_path: Path) -> None:
    model = linear()
    whole = nn.Sequential(model)
    for averaged, saved in ((model, whole), (whole, model)):
        ema = EMA(averaged)
        Hooks(ema, HFExport(tmp_path, model=saved, ema=ema, when=last(), models="main")).resume()


def test_a_hook_that_is_named_twice_is_refused() -> None:
    ema = EMA(linear())
    with pytest.raises(UsageError, match="this EMA is attached already"):
        Hooks(ema, ema)


def saved_until(directory: Path, step: int) -> Hooks:
    """Hooks of a new run over the checkpoints of an old one."""
    model = linear()
    with Hooks(ShardedSave(directory, model=model, when=every(1))) as hooks:
        for one in range(1, step + 1):
            hooks.step(one)
    return Hooks(ShardedSave(directory, model=model, when=every(10)))


def test_a_forgotten_resume_is_found_at_the_first_step(tmp_path: Path) -> None:
    hooks = saved_until(tmp_path, 2)
    with pytest.raises(UsageError, match=r"holds step-2, and resume\(\) was not called.*step = hooks\.resume\(\)"):
        hooks.step(1)
    hooks.close(broken_off=True)


def test_steps_beyond_all_checkpoints_need_no_resume(tmp_path: Path) -> None:
    with saved_until(tmp_path, 2) as hooks:  # something else has loaded the state
        hooks.step(3)


def test_a_resume_after_the_first_step_is_refused(tmp_path: Path) -> None:
    hooks = saved_until(tmp_path, 2)
    hooks.step(hooks.resume() + 1)
    with pytest.raises(UsageError, match=r"resume\(\) after step 3 would go back"):
        hooks.resume()
    hooks.close()


class Counting(Hook):
    """How often a step was passed on."""

    calls = 0

    def on_optimizer_step(self, step: int) -> None:  # noqa: ARG002
        self.calls += 1


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((0,), "steps count from 1"),
        ((1, 1), "step 1 was reported twice"),
        ((1, 3, 2), "step 2 was reported after step 3"),
    ],
)
def test_steps_out_of_order_are_refused_before_any_hook_hears_of_them(steps: tuple[int, ...], message: str) -> None:
    counting = Counting()
    hooks = Hooks(counting)
    for step in steps[:-1]:
        hooks.step(step)
    with pytest.raises(UsageError, match=message):
        hooks.step(steps[-1])
    assert counting.calls == len(steps) - 1


def test_a_loop_that_does_not_begin_where_the_run_was_is_told_where(tmp_path: Path) -> None:
    hooks = saved_until(tmp_path, 2)
    hooks.resume()
    with pytest.raises(UsageError, match=r"resume\(\) has loaded step 2: begin the loop there"):
        hooks.step(1)
    hooks.close(broken_off=True)


def test_a_run_that_reports_no_step_is_warned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hooks = Hooks(ShardedSave(tmp_path, model=linear(), when=every(1)))
    hooks.resume()
    with caplog.at_level(logging.WARNING):
        hooks.close()
    assert "no step was reported" in caplog.text


def made_before_sharding(directory: Path, sharding: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    if sharding == "fsdp2":
        fully_shard(model)
    else:
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    with pytest.raises(UsageError, match=r"\d of the 4 parameters of AdamW are not in the model") as caught:
        ShardedSave(directory, model=model, optimizer=optimizer, when=every(1))
    assert sharding == "fsdp1" or "made before the model was sharded" in str(caught.value)
    right = torch.optim.AdamW(model.parameters())
    ShardedSave(directory, model=model, optimizer=right, when=every(1)).close()


@pytest.mark.parametrize("sharding", ["fsdp2", "fsdp1"])
def test_an_optimizer_that_was_made_before_sharding_is_refused(tmp_path: Path, sharding: str) -> None:
    run_on_ranks(made_before_sharding, 2, tmp_path, tmp_path / "run", sharding)


def test_an_optimizer_of_other_parameters_is_refused_and_one_of_fewer_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, other = nn.Linear(4, 4), nn.Linear(3, 3)
    make = partial(ShardedSave, tmp_path, model=model, when=every(1))
    both = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.1)
    with pytest.raises(UsageError, match=r"2 of the 4 parameters of SGD are not in the model; .* shape \(3, 3\)"):
        make(optimizer=both)
    with pytest.raises(UsageError, match="weight is in 2 optimizers"):
        make(optimizer=[torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD([model.weight], lr=0.1)])
    make(optimizer=torch.optim.SGD([model.weight], lr=0.1)).close()
    assert "bias: trainable, but in no optimizer" in caplog.text


def test_an_optimizer_that_gets_foreign_parameters_later_is_named_at_the_save(tmp_path: Path) -> None:
    model = linear()
    optimizer = torch.optim.AdamW(model.parameters())
    save = ShardedSave(tmp_path, model=model, optimizer=optimizer, when=every(1))
    save.save(1)
    optimizer.add_param_group({"params": nn.Linear(3, 3).parameters()})
    with pytest.raises(UsageError, match=r"2 of the 4 parameters of AdamW are not in the model; .* shape \(3, 3\)"):
        save.save(2)
    save.close()


# What only several ranks can have wrong. Each body is one mistake, and ends with a collective that must work.


def sharded() -> nn.Module:
    torch.manual_seed(0)
    model = linear()
    fully_shard(model)
    return model


def other_schedules(directory: Path) -> None:
    Hooks(ShardedSave(directory, model=sharded(), when=every(5 + dist.get_rank())))


def other_directories(directory: Path) -> None:
    HFExport(directory / str(dist.get_rank()), model=sharded(), when=every(5))


def other_retentions(directory: Path) -> None:
    ShardedSave(directory, model=sharded(), when=every(5), keep=latest(1 + dist.get_rank()))


def other_hooks(directory: Path) -> None:
    model = sharded()
    if dist.get_rank() == 0:
        ShardedSave(directory, model=model, when=every(5))
    HFExport(directory / "hf", model=model, when=every(5))


def other_averages(directory: Path) -> None:
    model = sharded()
    ema = EMA(model, decay=0.9 + 0.01 * dist.get_rank())
    Hooks(ema, ShardedSave(directory, model=model, ema=ema, when=every(5)))


def other_order(directory: Path) -> None:
    model = sharded()
    hooks: list[Hook] = [ShardedSave(directory, model=model, when=every(5)), EMA(model)]
    Hooks(*(hooks if dist.get_rank() else reversed(hooks))).resume()


def other_steps(directory: Path) -> None:
    hooks = Hooks(ShardedSave(directory, model=sharded(), when=every(5)))
    hooks.step(1 + dist.get_rank())


def unfit_on_one_rank(directory: Path) -> None:
    model = sharded()
    ema = EMA(model)
    save = ShardedSave(directory, model=model, ema=ema, when=every(5))
    (Hooks(ema, save) if dist.get_rank() == 0 else Hooks(save)).resume()


def first_rank_only(directory: Path) -> None:
    if dist.get_rank() == 0:
        Hooks(ShardedSave(directory, model=linear(), when=every(5)))
    else:
        raise RanksDisagreeError("this rank makes no hooks, and so nobody can tell it")


def last_rank_only(directory: Path) -> None:
    if dist.get_rank() == 1:
        Hooks(HFExport(directory, model=linear(), when=every(5)))
    else:
        raise RanksDisagreeError("this rank makes no hooks, and so nobody can tell it")


def first_rank_steps(directory: Path) -> None:
    hooks = Hooks(ShardedSave(directory, model=sharded(), when=every(5)))
    hooks.resume()
    if dist.get_rank() == 0:
        hooks.step(1)
    raise RanksDisagreeError("this rank reports no step")


def other_stateful(directory: Path) -> None:
    names = ["loader", "sampler"]
    ShardedSave(directory, model=sharded(), when=every(5), stateful={names[dist.get_rank()]: nn.Linear(2, 2)})


def scheduler_on_one_rank(directory: Path) -> None:
    model = sharded()
    optimizer = torch.optim.SGD(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3) if dist.get_rank() else None
    ShardedSave(directory, model=model, when=every(5), optimizer=optimizer, scheduler=scheduler)


def saved_hooks(directory: Path, *others: Hook, thing: Any = None) -> Hooks:
    """Hooks of a run that has saved step 1."""
    for _ in range(2):
        save = ShardedSave(directory, model=sharded(), when=every(1), stateful={"thing": thing or nn.Linear(2, 2)})
        hooks = Hooks(save, *others)
        if not (directory / "step-1").exists():
            save.save(1)
            save.close()
    return hooks


def uneven_shards(directory: Path) -> None:
    rows = 3 - 2 * dist.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    model = nn.Module()
    weight = DTensor.from_local(torch.ones(rows, 2), mesh, [Shard(0)], shape=torch.Size([4, 2]), stride=(2, 1))
    model.weight = nn.Parameter(weight)
    save = ShardedSave(directory, model=model, when=every(5))
    try:
        save.save(1)
    finally:
        save.close()
        assert not [*directory.glob("*")]


def other_parts(directory: Path) -> None:
    saved_hooks(directory).resume(parts=["model"] if dist.get_rank() else None)


def other_places(directory: Path) -> None:
    saved_hooks(directory).resume(directory=directory if dist.get_rank() else None)


def resume_on_one_rank(directory: Path) -> None:
    hooks = saved_hooks(directory)
    if dist.get_rank() == 0:
        hooks.resume()
    else:
        hooks.step(2)


class Fails(Hook, nn.Linear):
    """A user's own code, that fails on the last rank alone."""

    def __init__(self, where: str) -> None:
        super().__init__(2, 2)
        self.where = where

    def fail(self, where: str) -> None:
        if dist.get_rank() == 1 and where == self.where:
            raise ValueError(f"{where} does not work here")

    def resume(self) -> int | None:
        return self.fail("resume")  # type: ignore[func-returns-value]

    def on_train_begin(self, step: int) -> None:  # noqa: ARG002
        self.fail("begin")

    def load_state_dict(self, *args: Any, **options: Any) -> Any:  # noqa: ARG002
        self.fail("load")


def user_resume_fails(directory: Path) -> None:
    fail_together(lambda: saved_hooks(directory, Fails("resume")).resume())


def user_begin_fails(directory: Path) -> None:
    fail_together(lambda: saved_hooks(directory, Fails("begin")).resume())


def user_load_fails(directory: Path) -> None:
    fail_together(lambda: saved_hooks(directory, thing=Fails("load")).resume())


def fail_together(act: Callable[[], Any]) -> None:
    """The rank itself raises what its own code raised."""
    try:
        act()
    except ValueError as error:
        raise UsageError(str(error)) from error


RANKS: list[tuple[Callable[[Path], None], str, str]] = [
    (other_schedules, "when: every(5) on rank 0; every(6) on rank 1", "the same"),
    (other_directories, "directory:", "the same"),
    (other_retentions, "keep: latest(1) on rank 0; latest(2) on rank 1", "the same"),
    (other_hooks, "making HFExport", "making HFExport"),
    (other_averages, "'decay': 0.9,", "the same"),
    (other_order, "hooks: EMA, ShardedSave on rank 0; ShardedSave, EMA on rank 1", "the same"),
    (other_steps, "step: 1 on rank 0; 2 on rank 1", "the same"),
    (unfit_on_one_rank, "the ranks do not do the same", "not attached"),
    (other_stateful, "stateful: ['loader'] on rank 0; ['sampler'] on rank 1", "the same"),
    (scheduler_on_one_rank, "scheduler: None on rank 0; StepLR on rank 1", "the same"),
    (uneven_shards, "this rank holds values of shape (3, 2) of a DTensor of shape (4, 2)", "would be (2, 2)"),
    (other_parts, "parts: None on rank 0; ['model'] on rank 1", "the same"),
    (other_places, "directory: None on rank 0", "the same"),
    (resume_on_one_rank, "is at 'reporting the first step' instead", "instead"),
    (user_resume_fails, "Fails.resume failed on 1 of 2 ranks", "resume does not work here"),
    (user_begin_fails, "Fails.on_train_begin failed on 1 of 2 ranks", "begin does not work here"),
    (user_load_fails, "handing back step-1 failed on 1 of 2 ranks", "load does not work here"),
    (first_rank_only, "making ShardedSave: rank 1 did not respond", "makes no hooks"),
    (last_rank_only, "makes no hooks", "making HFExport: rank 0 did not respond"),
    (first_rank_steps, "reporting the first step: rank 1 did not respond", "reports no step"),
]


ABSENT: dict[Callable[[Path], None], str] = {
    first_rank_only: "making ShardedSave: still waiting for rank 1 (no hook that saves or exports was made on rank 1",
    last_rank_only: "making HFExport: still waiting for rank 0 (no hook that saves or exports was made on rank 0",
    first_rank_steps: "reporting the first step: still waiting for rank 1, for up to 3 s",
}
"""The mistakes that only time can tell, since the other rank might be slow, and the warning that comes first."""


class Said(logging.Handler):
    """What was logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def run_mistake(body: Callable[[Path], None], messages: tuple[str, ...], directory: Path) -> None:
    os.environ[START_SECS] = "3"
    said = Said()
    logging.getLogger("shardsmith").addHandler(said)
    with pytest.raises((RankError, UsageError)) as caught:
        body(directory)
    assert messages[dist.get_rank()] in str(caught.value), str(caught.value)
    if isinstance(caught.value, RankTimeoutError):  # else nobody has waited
        assert "code that runs on one rank only" in str(caught.value)
        assert any(line.startswith(ABSENT[body]) for line in said.lines), said.lines
    total = torch.ones(1)
    dist.all_reduce(total)  # the training's group is as it was
    assert total.item() == dist.get_world_size()


@pytest.mark.parametrize("case", RANKS, ids=lambda case: case[0].__name__)
def test_ranks_that_do_not_do_the_same_are_found_on_all_of_them(case: Any, tmp_path: Path) -> None:
    body, *messages = case
    run_on_ranks(run_mistake, 2, tmp_path, body, tuple(messages), tmp_path / "run")


def wait_for_rank_0(directory: Path) -> None:
    rank = dist.get_rank()
    os.environ[START_SECS] = "4"
    os.environ["LOCAL_RANK"] = str(rank % 4)  # as a launcher with four ranks on each host sets it
    said = Said()
    logging.getLogger("shardsmith").addHandler(said)
    if rank:
        with pytest.raises(RankTimeoutError):
            ShardedSave(directory, model=linear(), when=every(1))
    assert any("still waiting for rank 0" in line for line in said.lines) is (rank in (1, 4)), said.lines
    dist.all_reduce(torch.ones(1))


def test_one_rank_of_each_host_warns_that_a_rank_has_not_come(tmp_path: Path) -> None:
    run_on_ranks(wait_for_rank_0, 6, tmp_path, tmp_path / "run")


def with_optimizer(directory: Path, model: nn.Module, other: nn.Module | None) -> ShardedSave:
    """``other``: the model whose parameters the optimizer has instead."""
    optimizer = torch.optim.SGD((other or model).parameters())
    return ShardedSave(directory, model=model, optimizer=optimizer, when=every(1))


WRONG: dict[str, Callable[[Path, Any], Any]] = {
    "keep": lambda directory, wrong: ShardedSave(directory, model=sharded(), when=every(1), keep=3 if wrong else None),
    "option": lambda directory, wrong: ShardedSave(
        directory, model=sharded(), when=every(1), async_mode="yes" if wrong else "async"
    ),
    "optimizer": lambda directory, wrong: with_optimizer(directory, sharded(), linear() if wrong else None),
    "dtype": lambda directory, wrong: HFExport(
        directory, model=sharded(), when=every(1), dtype="float17" if wrong else "original"
    ),
    "models": lambda directory, wrong: HFExport(
        directory, model=sharded(), when=every(1), models="ema" if wrong else "main"
    ),
    "folder": lambda directory, wrong: FolderSave(directory if wrong else sharded()),
    "recorder": lambda directory, wrong: Recorder(directory, model=sharded(), keep=7 if wrong else None),
    "manager": lambda directory, wrong: ShardedCheckpointManager(
        directory, model=sharded(), backend="tar" if wrong else "dcp"
    ),
}


def run_wrong(directory: Path, make: str, rank: int) -> None:
    """One rank has a wrong argument: it says so itself, and the others say that it has, at once; then all go on."""
    (directory / "run").mkdir(parents=True, exist_ok=True)
    with pytest.raises(UsageError if dist.get_rank() == rank else RankFailedError) as caught:
        WRONG[make](directory / "run", dist.get_rank() == rank)
    if isinstance(caught.value, RankFailedError):
        assert list(caught.value.failures) == [rank]
        assert "UsageError" in caught.value.failures[rank]
    thing = WRONG[make](directory / "run", False)
    if isinstance(thing, Hook):
        with Hooks(thing) as hooks:
            hooks.resume()
    dist.barrier()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("make", WRONG)
def test_a_wrong_argument_of_one_rank_is_told_to_the_others_at_once(make: str, rank: int, tmp_path: Path) -> None:
    run_on_ranks(run_wrong, 2, tmp_path, tmp_path, make, rank, timeout_secs=20)


def run_other_rates(directory: Path) -> None:
    model = sharded()
    groups = [{"params": [model.bias], "weight_decay": 0.1}, {"params": [model.weight]}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    save = ShardedSave(directory, model=model, optimizer=optimizer, when=every(1))
    optimizer.param_groups[1]["lr"] *= 1 + dist.get_rank()
    with pytest.raises(RanksDisagreeError) as caught:
        save.save(1)
    assert "optimizer.param_groups.weight.lr: rank 0 and rank 1 hold different values" in str(caught.value)
    assert "bias" not in str(caught.value)
    assert "one for all ranks: set the same on each" in str(caught.value)
    optimizer.param_groups[1]["lr"] = 1e-3
    save.save(2)
    optimizer.param_groups[0]["weight_decay"] += dist.get_rank()
    with pytest.raises(RanksDisagreeError, match=r"param_groups\.bias\.weight_decay: rank 0 and rank 1 hold"):
        save.save(3)
    save.close()


def test_options_of_an_optimizer_that_differ_between_ranks_are_refused_before_they_are_saved(tmp_path: Path) -> None:
    run_on_ranks(run_other_rates, 2, tmp_path, tmp_path / "run")
    assert committed_steps(tmp_path / "run") == [2]


class Wraps:
    """An optimizer in another one, as accelerate and others hand it out."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups


def test_a_schedule_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    model = linear()
    mine, other = torch.optim.SGD(model.parameters()), torch.optim.SGD(model.parameters())
    make = partial(ShardedSave, tmp_path, model=model, optimizer=mine, when=every(1))
    for kind in (StepLR, lambda one, _: CosineAnnealingLR(one, 3), lambda one, _: ChainedScheduler([StepLR(one, 3)])):
        with pytest.raises(UsageError, match="sets the learning rate of an optimizer that is not the one given"):
            make(scheduler=kind(other, 3))
        make(scheduler=kind(mine, 3)).close()
    wrapped = StepLR(mine, 3)
    wrapped.optimizer = Wraps(mine)  # type: ignore[assignment]
    make(scheduler=wrapped).close()


def run_late_rank(directory: Path) -> None:
    if dist.get_rank() == 1:
        dist.recv(torch.empty(1), 0)  # until the other one has been there for a while
    else:
        sender = dist.isend(torch.ones(1), 1)
        sender.wait()
    with Hooks(ShardedSave(directory, model=linear(), when=every(1))) as hooks:
        hooks.step(1)


def test_a_rank_that_is_late_is_waited_for(tmp_path: Path) -> None:
    run_on_ranks(run_late_rank, 2, tmp_path, tmp_path / "run")
    assert (tmp_path / "run" / "step-1" / "metadata.json").is_file()
