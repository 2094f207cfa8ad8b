"""What makes an optimizer and an average wait until a save has copied what they are about to change."""

from __future__ import annotations

from collections.abc import Sequence

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from shardsmith.errors import UsageError
from shardsmith.run_state.save import SaveInProgress

from .ema import EMA


class OpenCopy:
    """The copy that the save in flight makes while the training goes on; with ``staging="copy"`` there is none.

    On the thread that trains; no communication.
    """

    def __init__(self) -> None:
        self._job: SaveInProgress | None = None
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
        self._handles = [one.register_step_pre_hook(lambda *_: self.settle()) for one in optimizers]
        self._average = average
        if average is not None:
            average.before_changes.append(self.settle)

    @property
    def is_wanted(self) -> bool:
        """Whether saves are to copy while the training goes on."""
        return bool(self._handles)

    def begin(self, job: SaveInProgress) -> None:
        """A save has begun to copy."""
        self._job = job

    def settle(self) -> None:
        """Return when the copy is complete."""
        if self._job is not None:
            self._job.settle()
            self._job = None

    def close(self) -> None:
        """Let optimizers and average go their way."""
        for handle in self._handles:
            handle.remove()
        if self._average is not None and self.settle in self._average.before_changes:
            self._average.before_changes.remove(self.settle)
