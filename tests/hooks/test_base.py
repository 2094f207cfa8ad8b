"""``Hooks`` passes the moments on, in order and each as often as it should be."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardsmith.hooks import Hook, Hooks


class Noting(Hook):
    """Writes down what it is told."""

    def __init__(self, name: str, notes: list[str]) -> None:
        self.name = name
        self.notes = notes

    def on_optimizer_step(self, step: int) -> None:
        self.notes.append(f"{self.name} optimizer {step}")

    def on_saved(self, step: int, path: Path) -> None:
        self.notes.append(f"{self.name} saved {step} {path}")

    def on_stop(self, step: int) -> None:
        self.notes.append(f"{self.name} stop {step}")

    def on_train_end(self, step: int) -> None:
        self.notes.append(f"{self.name} end {step}")

    def close(self) -> None:
        self.notes.append(f"{self.name} close")


@pytest.fixture
def notes() -> list[str]:
    return []


def test_a_hook_that_is_added_comes_after_the_others_and_hears_of_saves(notes: list[str]) -> None:
    late = Noting("late", notes)
    hooks = Hooks(Noting("first", notes))
    hooks.add(late)
    hooks.step(1)
    assert late.announce_saved is not None
    late.announce_saved(1, Path("a"))
    assert notes == ["first optimizer 1", "late optimizer 1", "first saved 1 a", "late saved 1 a"]
    assert hooks.steps_done == 1


def test_the_end_of_training_is_told_once(notes: list[str]) -> None:
    hooks = Hooks(Noting("one", notes))
    hooks.step(3)
    hooks.train_end(3)
    hooks.close()
    hooks.close()
    assert notes[1:] == ["one end 3", "one close"]


def test_a_training_that_is_broken_off_has_no_end(notes: list[str]) -> None:
    Hooks(Noting("one", notes)).close(broken_off=True)
    with pytest.raises(ZeroDivisionError), Hooks(Noting("two", notes)):
        raise ZeroDivisionError
    assert notes == ["one close", "two close"]
