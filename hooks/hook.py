"""``Hook``: the moments of a training run, and what a hook tells of itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from shardsmith.sharding.step_copies import StepCopies

from .background import Background
from .events import Event
from .schedule import Schedule
from .wiring import Parts


def _nobody(_: Event) -> None:
    """Who listens where nobody does."""


def _nothing() -> None:
    """What a request for the end does without ``Hooks``."""


class Hook:
    """Base of all hooks. Override the moments that a hook needs.

    Every moment is called on all ranks, on the main thread, in the order in which the hooks were given. A moment may
    communicate only if its docstring says so, and then it must do so on all ranks.
    """

    announce_saved: Callable[[int, Path], None] | None = None
    """Set by ``Hooks`` on each hook. A hook that saves calls it on the main thread: ``announce_saved(step, path)``."""

    emit: Callable[[Event], None] = staticmethod(_nobody)
    """Set by ``Hooks`` if somebody listens. A hook calls it, on any rank and thread, when something has ended."""

    request_stop: Callable[[], None] = staticmethod(_nothing)
    """Set by ``Hooks``. A hook calls it, on any rank and thread, when the run is to be saved and to end."""

    step_copies: StepCopies | None = None
    """Set by ``Hooks``. What hooks before this one have copied at this step, for those after them to read."""

    when: Schedule = Schedule()
    """Whose occasions ``Hooks`` watches for."""

    loads_weights: bool = False
    """Whether ``on_train_begin`` may change the weights. It is then called before that of the other hooks."""

    parts: Parts = Parts()
    """What this hook works with. ``Hooks`` checks before the first step that all of it fits together."""

    background: Background | None = None
    """What this hook does in the background. ``Hooks`` lets all ranks raise a failure in it after the same step."""

    @property
    def is_heard(self) -> bool:
        """Whether somebody listens to what this hook emits."""
        return self.emit is not Hook.emit

    @staticmethod
    def suggestion(value: object) -> str | None:
        """Return what to write instead of a value that is no hook; None if that is not clear."""
        if isinstance(value, list | tuple):
            return "the hooks one by one, as in Hooks(ema, save)"
        return "nothing in its place" if value is None else None

    def resume(self) -> int | None:
        """Restore what this hook saved last; return the step of that, or None without any. May communicate."""
        return None

    def on_train_begin(self, step: int) -> None:
        """Training begins after ``step`` steps done. May communicate."""

    def on_optimizer_step(self, step: int) -> None:
        """The optimizer has made step number ``step``; gradients may still be there. Must not communicate."""

    def on_step_end(self, step: int) -> None:
        """Step number ``step`` is over. May communicate."""

    def on_occasion(self, step: int) -> None:
        """An occasion of ``when`` has come, such as a signal. After ``on_step_end``; may communicate."""

    def on_saved(self, step: int, path: Path) -> None:
        """A checkpoint is committed. Ranks may get here during different steps, so it must not communicate."""

    def on_train_end(self, step: int) -> None:
        """Training ends after ``step`` steps done. May communicate."""

    def on_stop(self, step: int) -> None:
        """The run is to end before its time, after ``step`` steps done: what is needed to resume is to be saved.

        It may communicate. ``on_train_end`` does not come then, but ``close`` does.
        """

    def report_background(self) -> None:
        """Raise what failed in the background. After the same step on all ranks, where ``background`` is there."""

    def close(self) -> None:
        """Wait for background work, raise what failed in it, let go of resources. May communicate."""

    def _announce_save(self, step: int, path: Path) -> None:
        """For hooks that save: tell the others, through ``Hooks`` if there is one. Main thread."""
        if self.announce_saved:
            self.announce_saved(step, path)
