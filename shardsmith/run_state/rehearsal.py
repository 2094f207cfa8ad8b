"""What the first save of a run makes for all later ones, made without a save."""

from __future__ import annotations

from collections.abc import Callable, Collection

from shardsmith.errors import UsageError
from shardsmith.run_state.contents import Contents
from shardsmith.run_state.save import SaveInProgress
from shardsmith.sharding.live_boxes import StagingBuffer
from shardsmith.sharding.staged_copy import StagedCopy


def refuse_without_copies(owner: str, *, prewarm: bool, has_copies: bool) -> None:
    """Raise UsageError, in the name of ``owner``, if there is to be memory for copies that its saves do not make."""
    if prewarm and not has_copies:
        raise UsageError(
            f'{owner}: prewarm=True makes memory for copies, which async_mode="disabled" does not make. Leave one of '
            "them out. Nothing was done."
        )


class Rehearsal(SaveInProgress):
    """A save of which nothing is written. Make it on every rank, then ``prepare``."""

    def prepare(
        self,
        collect: Callable[[], Contents],
        buffer: StagingBuffer,
        shared_keys: Collection[str] = (),
    ) -> None:
        """Agree on who writes what, and make the memory of the copies. Main thread; communicates.

        Arguments as of ``begin``.

        Raises:
            RankFailedError: on all ranks, if collecting failed on any, the ranks disagree, or a host has too little
                memory for the copies.
            RanksDisagreeError: on all ranks, naming the values under ``shared_keys`` that are different.
        """
        phase = "making memory for saves"
        self.begin(collect, shared_keys)
        buffer.require_room(self._ranks, phase, self._tensors_and_dtypes)
        self._ranks.gather(phase, lambda: StagedCopy(*self._tensors_and_dtypes(), buffer).warm())

    def _make_directory(self) -> str:
        return ""

    def _make_on_this_host(self) -> None:
        """Make nothing."""
