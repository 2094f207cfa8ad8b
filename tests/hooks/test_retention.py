from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardsmith.errors import UsageError
from shardsmith.hooks.retention import Retention, latest, multiples_of, steps_to_remove

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
