"""What makes optimizers and an average wait until a save or an export has copied what they are about to change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from shardsmith.errors import UsageError

from .ema import EMA


class Copying(Protocol):
    """A save or an export that copies while the training goes on."""

    def settle(self) -> None:
        """Return when all is copied."""
        ...


class OpenCopy:
    """The copy that is made while the training goes on; with ``staging="copy"`` there is none.

    On the thread that trains; no communication.
    """

    def __init__(self) -> None:
        self._jobs: list[Copying] = []
        self._handles: list[RemovableHandle] = []
        self._average: EMA | None = None

    def guard(self, optimizers: Sequence[Optimizer], average: EMA | None, *, in_background: bool) -> None:
        """Have everything that changes what is saved wait for the copy.

        Raises:
            UsageError: there is no optimizer to wait, or the save is not written in the background.
        """
        if not optimizers or not in_background:
            raise UsageError(
                'staging="overlap" copies until optimizer.step(), while the save runs in the background: it needs '
                'optimizer=... and async_mode="async"'
            )
        # Before the step itself, which changes parameters and moments.
        self._handles = [one.register_step_pre_hook(lambda *_: self.settle()) for one in optimizers]
        self._guard_average(average)

    def guard_all(self, average: EMA | None) -> None:
        """As ``guard``, of all optimizers that there are: an export does not know which of them has its weights."""
        # torch's hook for all optimizers, those made later included.
        self._handles = [register_optimizer_step_pre_hook(lambda *_: self.settle())]
        self._guard_average(average)

    def _guard_average(self, average: EMA | None) -> None:
        self._average = average
        if average is not None:
            average.before_changes.append(self.settle)

    @property
    def is_wanted(self) -> bool:
        """Whether saves are to copy while the training goes on."""
        return bool(self._handles)

    def begin(self, *jobs: Copying) -> None:
        """These have begun to copy."""
        self._jobs = [*jobs]

    def settle(self) -> None:
        """Return when the copy is complete."""
        # Taken out first, so that what a job raises is raised once.
        jobs, self._jobs = self._jobs, []
        for job in jobs:
            job.settle()

    def close(self) -> None:
        """Let optimizers and average go their way."""
        for handle in self._handles:
            handle.remove()
        if self._average is not None and self.settle in self._average.before_changes:
            self._average.before_changes.remove(self.settle)
