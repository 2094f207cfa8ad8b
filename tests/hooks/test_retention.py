from __future__ import annotations

import math
import os
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from shardsmith.errors import UsageError
from shardsmith.ground.layout import METRICS_FILE
from shardsmith.hooks import Hooks, Retention, ShardedSave, best, every, keep_if, latest, multiples_of, newer_than
from shardsmith.hooks.retention import add_metrics
from shardsmith.manifest.checkpoints import committed_steps
from shardsmith.manifest.retention import read_metrics, steps_to_remove

STEPS = st.lists(st.integers(0, 200))
POLICIES = st.builds(Retention, st.integers(0, 5), st.frozensets(st.integers(1, 60), max_size=3))


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        (latest(1), {50}),
        (latest(3), {30, 40, 50}),
        (latest(99), {0, 10, 20, 30, 40, 50}),
        (multiples_of(20), {0, 20, 40}),
        (latest(2) | multiples_of(30), {0, 30, 40, 50}),
        (latest(1) | latest(2), {40, 50}),
    ],
    ids=str,
)
def test_keeps_these_of_steps_0_to_50(policy: Retention, kept: set[int]) -> None:
    assert policy.keep([30, 0, 50, 20, 10, 40]) == kept


@given(policy=POLICIES, steps=STEPS, held=st.sets(st.integers(0, 200)))
def test_removal_spares_the_newest_the_held_and_the_kept_and_nothing_else(
    policy: Retention, steps: list[int], held: set[int]
) -> None:
    removed = steps_to_remove(policy, steps, held)
    spared = held | policy.keep(steps) | set(sorted(steps)[-1:])
    assert removed == sorted(set(steps) - spared)


@given(first=POLICIES, second=POLICIES, steps=STEPS)
def test_a_combination_keeps_what_either_keeps(first: Retention, second: Retention, steps: list[int]) -> None:
    assert (first | second).keep(steps) == first.keep(steps) | second.keep(steps)


@given(policy=POLICIES, steps=STEPS)
def test_removing_again_removes_nothing(policy: Retention, steps: list[int]) -> None:
    left = set(steps) - set(steps_to_remove(policy, steps))
    assert steps_to_remove(policy, left) == []


def test_without_a_policy_everything_stays() -> None:
    assert steps_to_remove(None, [1, 2, 3]) == []


@pytest.mark.parametrize("text", ["latest(3) | multiples_of(10000)", "latest(1)", "multiples_of(5) | multiples_of(7)"])
def test_repr_reads_like_the_call(text: str) -> None:
    assert repr(eval(text)) == text


@pytest.mark.parametrize("call", ["latest(0)", "latest(-1)", "latest(True)", "multiples_of(0)", "multiples_of(1.5)"])
def test_counts_that_make_no_sense_are_refused(call: str) -> None:
    with pytest.raises(UsageError, match="whole number"):
        eval(call)


def directory_with(tmp_path: Path, metrics: dict[int, float]) -> Path:
    for step, value in metrics.items():
        add_metrics(tmp_path, step, {"loss": value})
    return tmp_path


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        (best("loss"), {40, 60}),
        (best("loss", keep=2), {20, 40, 60}),
        (best("loss", mode="max"), {10, 60}),
        (best("loss", keep=9), {10, 20, 30, 40, 50, 60}),
        (best("accuracy"), {10, 20, 30, 40, 50, 60}),
        (latest(1) | best("loss"), {40, 60}),
        (keep_if(lambda step: step > 40) | best("loss"), {40, 50, 60}),
    ],
    ids=str,
)
def test_the_best_stay_and_those_whose_value_may_still_come(policy: Retention, kept: set[int], tmp_path: Path) -> None:
    directory = directory_with(tmp_path, {10: 3.0, 20: 1.5, 30: math.nan, 40: 9.0, 50: 2.0})
    add_metrics(directory, 40, {"loss": 1.0})  # measured anew
    with (directory / METRICS_FILE).open("a") as cut:
        cut.write('{"step": 10, "lo')
    assert policy.keep([10, 20, 30, 40, 50, 60], directory) == kept


def test_what_was_saved_lately_stays(tmp_path: Path) -> None:
    for step, hours in ((1, 50.0), (2, 47.0), (3, 1.0)):
        (tmp_path / f"step-{step}").mkdir()
        then = time.time() - 3600 * hours
        os.utime(tmp_path / f"step-{step}", (then, then))
    assert newer_than(days=2).keep([1, 2, 3, 4], tmp_path) == {2, 3, 4}
    assert newer_than(hours=2).keep([1, 2, 3], tmp_path) == {3}
    assert repr(newer_than(days=1, hours=1)) == "newer_than(hours=25)"
    with pytest.raises(UsageError, match=r"newer_than\(days=2\)"):
        newer_than()


def test_a_run_keeps_its_best_checkpoint_also_after_a_resume(tmp_path: Path) -> None:
    losses = {1: 4.0, 2: 1.0, 3: 3.0, 4: 2.0, 5: 5.0}
    for steps in (range(1, 4), range(4, 6)):
        model, keep = nn.Linear(2, 2), best("eval_loss")
        save = ShardedSave(tmp_path, model=model, when=every(1), keep=keep, async_mode="disabled")
        with Hooks(save) as hooks:
            assert hooks.resume() == steps[0] - 1
            for step in steps:
                hooks.step(step)
                hooks.metric(step, eval_loss=torch.tensor(losses[step]))
    assert committed_steps(tmp_path) == [2, 5]
    assert read_metrics(tmp_path) == {step: {"eval_loss": loss} for step, loss in losses.items()}
