"""A search for the newest checkpoint that is sound, each of which is verified while it is loaded.

A checkpoint is read once. So tensors are filled before it is known whether its files are what was written; what is no
tensor is only handed back afterwards. After a damaged one, the one before it is loaded over the same tensors. If there
is none, what is in memory must not be trained on, and the caller has to say so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import chain
from pathlib import Path

from shardsmith.errors import CheckpointError, IncompleteCheckpointError, RankFailedError, UsageError
from shardsmith.ground import layout
from shardsmith.ground.ranks import Ranks
from shardsmith.manifest.checkpoints import find_damage, set_aside
from shardsmith.manifest.metadata import FileRecord, read_metadata
from shardsmith.run_state.resume_parts import OnMissing

log = logging.getLogger(__name__)

_SHARDS = ".distcp"
_WEIGHTS = ".safetensors"

Load = Callable[[Path, Mapping[str, FileRecord], OnMissing], list[str]]
"""Loads a checkpoint, verifying files meanwhile; what is wrong with those. All ranks; communicates."""

Find = Callable[[], Path | None]
"""Returns the directory of a checkpoint; None if it cannot be had in this way. All ranks; may communicate."""


class Resumption:
    """Tries one checkpoint after the other.

    Attributes:
        spoiled_by: Name of the damaged checkpoint that tensors were filled from last; None if they hold none.
    """

    def __init__(
        self,
        ranks: Ranks,
        *,
        set_damaged_aside: bool,
        spoiled_by: str | None = None,
        parts: Collection[str] | None = None,
    ) -> None:
        """Nothing is tried yet.

        Args:
            ranks: Those that load.
            set_damaged_aside: Rename what is damaged, so that it counts no more.
            spoiled_by: What an earlier search has left in the tensors.
            parts: What is loaded; None for all.
        """
        self._ranks = ranks
        self._set_damaged_aside = set_damaged_aside
        self.spoiled_by = spoiled_by
        self._loads_weights = parts is None or {"model", "ema"} <= set(parts)

    def load_newest(
        self, directory: Path, steps: Mapping[int, Sequence[Find]], load: Load, on_missing: OnMissing
    ) -> int | None:
        """Load the newest checkpoint that is sound; return its step, or None without any. All ranks; communicates.

        Args:
            directory: Where the checkpoints are.
            steps: Which, and how each is found, in the order of preference.
            load: Loads one.
            on_missing: What to do with parts that it does not have. After a damaged one nothing may be missing, for
                that has filled them all.

        Raises:
            IncompleteCheckpointError: there are some, but none is sound.
            What ``load`` raises, if the checkpoint is sound all the same.
        """
        # The newest first; of a step that is in two places, the second one is tried before an older step.
        for step in sorted(steps, reverse=True):
            for find in steps[step]:
                checkpoint = find()
                if checkpoint is not None and self._load(checkpoint, load, on_missing):
                    return step
        if steps:
            names = ", ".join(map(layout.step_name, sorted(steps)))
            aside = " and was set aside" * self._set_damaged_aside
            raise IncompleteCheckpointError(
                directory, f"every checkpoint is damaged{aside}: {names}{self._consequence()}"
            )
        return None

    def _load(self, checkpoint: Path, load: Load, on_missing: OnMissing) -> bool:
        """Load a checkpoint, unless it is damaged; whether it is sound."""
        # First the files that `load` does not hash, and the sizes of all.
        if not self._is_sound(checkpoint, unread=self._unread(checkpoint)):
            return False
        try:
            damage = load(checkpoint, _shards(checkpoint), "raise" if self.spoiled_by else on_missing)
        except (CheckpointError, RankFailedError) as error:
            # Was it damage that made the load fail? All files are read to find out.
            if self._is_sound(checkpoint, unread=()):
                if self.spoiled_by:
                    error.add_note(self._consequence().strip())
                raise
            self.spoiled_by = checkpoint.name
            return False
        if damage:
            self._ranks.lead(f"verifying {checkpoint.name}", lambda: self._judge(checkpoint, damage))
        # A sound step has been loaded over whatever a damaged one has left.
        self.spoiled_by = checkpoint.name if damage else None
        return not damage

    def _unread(self, checkpoint: Path) -> tuple[str, ...]:
        """Suffixes of files that are verified while they are loaded.

        Those of weights beside a DCP index are not hashed at all: what was loaded from them is compared with the
        digests that were recorded.
        """
        has_weights = self._loads_weights and (checkpoint / layout.DCP_INDEX_FILE).exists()
        return (_SHARDS, _WEIGHTS) if has_weights else (_SHARDS,)

    def _consequence(self) -> str:
        """What follows for the state in memory, if nothing sound is loaded now, and what to do."""
        if self.spoiled_by is None:
            again = " Otherwise a process that is started again begins at step 0." if self._set_damaged_aside else ""
            return f"\nNothing was loaded. Put a sound copy of a step there, or use resume(directory=...).{again}"
        return (
            f"\nTensors of this run hold what was loaded from {self.spoiled_by}, which is damaged: "
            "do not train on them. Start the process again."
        )

    def _is_sound(self, checkpoint: Path, unread: tuple[str, ...]) -> bool:
        """Look at all files, divided among the ranks; set the checkpoint aside if any is damaged. Communicates."""
        part, parts = self._ranks.rank, self._ranks.size
        return self._ranks.agree(
            f"verifying {checkpoint.name}",
            lambda: find_damage(checkpoint, unread=unread, part=part, parts=parts),
            lambda found: self._judge(checkpoint, [*chain(*found)]),
        )

    def _judge(self, checkpoint: Path, damage: list[str]) -> bool:
        """Rank 0."""
        if damage:
            where = f" and was set aside as {set_aside(checkpoint)}" if self._set_damaged_aside else ""
            log.warning("%s is damaged%s\n  %s", checkpoint, where, "\n  ".join(damage))
        return not damage


def refuse_spoiled(name: str | None) -> None:
    """Raise UsageError if the tensors of this run hold what a damaged checkpoint held, of which this is the name."""
    if name is not None:
        raise UsageError(
            f"tensors of this run hold what was loaded from {name}, which is damaged: nothing is saved. "
            "Load a checkpoint that is sound, or start the process again"
        )


def _shards(checkpoint: Path) -> dict[str, FileRecord]:
    """The files that are read once, while they are loaded: those of a DCP directory."""
    if not (checkpoint / layout.DCP_INDEX_FILE).exists():
        return {}
    # All else was hashed before the load, but for weights: see `_unread`.
    return {name: record for name, record in read_metadata(checkpoint).files.items() if name.endswith(_SHARDS)}
