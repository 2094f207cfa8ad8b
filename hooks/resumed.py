"""How a run gets back what it has saved: which steps are tried, what is loaded, and whether it is sound."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from shardsmith.ground.ranks import Ranks
from shardsmith.manifest import checkpoints
from shardsmith.manifest.metadata import FileRecord, read_metadata
from shardsmith.run_state.resume_parts import OnMissing, load_parts
from shardsmith.run_state.resumption import Resumption, refuse_spoiled
from shardsmith.run_state.train_state import TrainState

from .local_cache import LocalCache, find_steps
from .step_folder import StepFolder, leave_unfinished

log = logging.getLogger(__name__)


class ResumedRun:
    """Loads steps into the state of a run. All ranks call its methods together.

    Attributes:
        on_missing: What to do with a part that a checkpoint does not have, if a call does not say.
    """

    def __init__(
        self,
        directory: Path,
        state: TrainState,
        ranks: Ranks,
        steps: StepFolder,
        cache: LocalCache | None,
        on_missing: OnMissing,
    ) -> None:
        """Load nothing yet.

        Args:
            directory: Where the run saves, absolute.
            state: What is filled.
            ranks: Those that load.
            steps: The steps of ``directory``.
            cache: The steps on the disks of the hosts, if the run keeps some there.
            on_missing: As in the class.
        """
        self.on_missing = on_missing
        self._directory = directory
        self._state = state
        self._ranks = ranks
        self._steps = steps
        self._cache = cache
        self._spoiled_by: str | None = None  # the damaged step in memory, if nothing sound was loaded over it

    def refuse_spoiled(self) -> None:
        """Raise UsageError if tensors of the run hold what a damaged checkpoint held. No communication."""
        refuse_spoiled(self._spoiled_by)

    def load_newest(
        self, step: int | None, parts: Sequence[str] | None, place: Path, on_missing: OnMissing | None
    ) -> int | None:
        """Load the newest sound step of ``place``; return it, or None without any. Communicates.

        Args and errors are those of ``ShardedSave.resume``; ``place`` is absolute.
        """
        is_own = place == self._directory
        cache = self._cache if is_own else None
        # A step that was asked for may be in the store alone.
        steps = find_steps(self._ranks, place, cache, needs_store=step is not None)
        if step is not None:
            steps = {step: steps[checkpoints.only_step(place, sorted(steps), step)]}
        # Only where the run looks for its newest step in its own folder, and not while the store is away.
        aside = is_own and step is None and (cache is None or cache.alone_since is None)
        search = Resumption(self._ranks, set_damaged_aside=aside, spoiled_by=self._spoiled_by, parts=parts)
        try:
            found = search.load_newest(place, steps, partial(self._load, parts=parts), on_missing or self.on_missing)
        finally:
            # After an error, too: the tensors may hold what was damaged.
            self._spoiled_by = search.spoiled_by
        if cache is not None:
            cache.resumed(found)
        if found is not None and is_own:
            self._tidy(found, later=step is not None)
        return found

    def _tidy(self, found: int, *, later: bool) -> None:
        """Leave nothing in the run's folder that is newer than the step it goes on from. Communicates.

        Without this, the next resume would take a step of the history that was just given up.
        """
        if later:
            self._ranks.lead("setting later steps aside", partial(checkpoints.set_later_aside, self._directory, found))
        self._ranks.lead("setting aside what is half deleted", partial(leave_unfinished, self._directory, found))
        self._ranks.lead("pointing to the newest step", partial(self._steps.point_to, found))

    def load(self, checkpoint: Path, parts: Sequence[str] | None, on_missing: OnMissing | None) -> None:
        """Load one checkpoint. Communicates. Args and errors are those of ``ShardedSave.load``."""
        self._load(checkpoint, {}, on_missing or self.on_missing, parts=parts)
        self._spoiled_by = None

    def _load(
        self, path: Path, verified: Mapping[str, FileRecord], on_missing: OnMissing, *, parts: Sequence[str] | None
    ) -> list[str]:
        """As ``load_parts``."""
        if read_metadata(path).ema is not None and self._state.ema is None:
            log.warning("%s holds an EMA, but no EMA is attached: it is not loaded", path)
        return load_parts(path, self._state, self._ranks, parts=parts, on_missing=on_missing, verified=verified)
