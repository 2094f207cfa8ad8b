"""The moments of a training run, and ``Hooks``, which passes them on in order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self


class Hook:
    """Something that a training loop attaches. Override the moments that it needs.

    Every moment is called on all ranks, on the main thread, in the order in which the hooks were given. A moment may
    communicate only if its docstring says so, and then it must do so on all ranks.
    """

    announce_saved: Callable[[int, Path], None] | None = None
    """Set by ``Hooks`` on each hook. A hook that saves calls it on the main thread: ``announce_saved(step, path)``."""

    loads_weights: bool = False
    """Whether ``on_train_begin`` may change the weights. It is then called before that of the other hooks."""

    def resume(self) -> int | None:
        """Restore what this hook saved last; the step it was saved at, or None if it has nothing. May communicate."""
        return None

    def on_train_begin(self, step: int) -> None:
        """Training begins after ``step`` steps done. May communicate."""

    def on_optimizer_step(self, step: int) -> None:
        """The optimizer has made step number ``step``; gradients may still be there. Must not communicate."""

    def on_step_end(self, step: int) -> None:
        """Step number ``step`` is over. May communicate."""

    def on_saved(self, step: int, path: Path) -> None:
        """A checkpoint is committed. Ranks may get here during different steps, so it must not communicate."""

    def on_train_end(self, step: int) -> None:
        """Training ends after ``step`` steps done. May communicate."""

    def close(self) -> None:
        """Wait for background work, raise what failed in it, let go of resources. May communicate."""


class Hooks:
    """Several hooks as one object for the training loop.

        step = hooks.resume()
        while step < max_steps:
            ...; optimizer.step(); step += 1
            hooks.step(step)
        hooks.close()

    All ranks make the same calls. As a context manager it closes at the end; after an exception it waits for
    background work but does not save a last step.
    """

    def __init__(self, *hooks: Hook) -> None:
        self.hooks: tuple[Hook, ...] = ()
        self._step = 0
        self._open = True
        self._ended = False
        for hook in hooks:
            self.add(hook)

    @property
    def steps_done(self) -> int:
        """The last step that was reported, or resumed at."""
        return self._step

    def add(self, hook: Hook) -> None:
        """One more, after the others. Before ``resume``."""
        hook.announce_saved = self._on_saved
        self.hooks = (*self.hooks, hook)

    def resume(self) -> int:
        """Restore the newest usable state and return how many steps were done; 0 on a fresh start. Communicates."""
        steps = [step for hook in self.hooks if (step := hook.resume()) is not None]
        self._step = max(steps, default=0)
        for hook in sorted(self.hooks, key=lambda hook: not hook.loads_weights):
            hook.on_train_begin(self._step)
        return self._step

    def step(self, step: int) -> None:
        """Report that optimizer step number ``step`` (from 1) is done. Raises what failed in the background."""
        self.optimizer_step(step)
        self.step_end(step)

    def optimizer_step(self, step: int) -> None:
        """The first half of ``step``, for trainers that have a moment right after ``optimizer.step()``."""
        for hook in self.hooks:
            hook.on_optimizer_step(step)

    def step_end(self, step: int) -> None:
        """The second half of ``step``."""
        self._step = step
        for hook in self.hooks:
            hook.on_step_end(step)

    def train_end(self, step: int) -> None:
        """The first half of ``close``, for trainers that do more after the last step: what is due at it is done."""
        self._ended = True
        for hook in self.hooks:
            hook.on_train_end(step)

    def close(self, *, broken_off: bool = False) -> None:
        """End the training: what is due at the last step is done, background work is waited for. Raises what failed.

        Args:
            broken_off: It did not get to its end: only wait for background work.
        """
        if self._open:
            if not self._ended and not broken_off:
                self.train_end(self._step)
            self._close()

    def _close(self) -> None:
        """Close every hook, also when one of them raises; the first error is raised in the end."""
        self._open = False
        errors: list[Exception] = []
        for hook in self.hooks:
            try:
                hook.close()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def _on_saved(self, step: int, path: Path) -> None:
        for hook in self.hooks:
            hook.on_saved(step, path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(broken_off=kind is not None)
