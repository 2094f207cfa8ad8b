from __future__ import annotations

import pytest

from shardsmith.errors import UsageError
from shardsmith.hooks.schedule import Schedule, at, every, last


@pytest.mark.parametrize(
    ("schedule", "due"),
    [
        (every(3), [3, 6, 9]),
        (every(3) | every(4), [3, 4, 6, 8, 9]),
        (at(7, 2), [2, 7]),
        (last(), [10]),
        (every(5) | at(1) | last(), [1, 5, 10]),
        (Schedule(), []),
    ],
    ids=str,
)
def test_due_at_these_of_the_steps_0_to_10_of_a_run_of_10(schedule: Schedule, due: list[int]) -> None:
    assert [step for step in range(11) if schedule.due(step, last=step == 10)] == due


def test_last_needs_no_multiple_and_every_does_not_mean_last() -> None:
    assert last().due(7, last=True)
    assert not every(5).due(7, last=True)


def test_equal_whatever_the_order_and_usable_as_a_key() -> None:
    assert every(500) | last() == last() | every(500) | every(500)
    assert len({at(1, 2), at(2) | at(1)}) == 1


@pytest.mark.parametrize("text", ["every(500) | last()", "every(10) | every(25) | at(100, 250)", "at(1)", "last()"])
def test_repr_reads_like_the_call(text: str) -> None:
    assert repr(eval(text)) == text


@pytest.mark.parametrize("call", ["every(0)", "every(-5)", "every(2.5)", "every(True)", "at()", "at(3, 0)", "at('7')"])
def test_steps_that_make_no_sense_are_refused(call: str) -> None:
    with pytest.raises(UsageError, match=r"whole number|names no step"):
        eval(call)


def test_only_schedules_combine() -> None:
    with pytest.raises(TypeError):
        every(500) | 250  # type: ignore[operator]


@pytest.mark.parametrize(
    ("schedule", "other", "rest"),
    [
        (every(6) | at(4), every(3) | at(4, 5), None),
        (every(4) | every(9), every(3), every(4)),
        (at(3, 4) | last(), every(2), at(3) | last()),
        (every(2), at(2, 4, 6), every(2)),
        (last(), last(), None),
    ],
    ids=str,
)
def test_what_another_schedule_leaves_out(schedule: Schedule, other: Schedule, rest: Schedule | None) -> None:
    assert schedule.outside(other) == rest
