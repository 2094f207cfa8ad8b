"""The folder of an ``HFExport``: which of its steps are there and sound, and which go."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from pathlib import Path

from shardsmith.ground.commit import check_writable, sweep
from shardsmith.ground.layout import PROVENANCE_FILE, step_name, unfinished_step
from shardsmith.hf.hf_directory import protect
from shardsmith.manifest.checkpoints import refuse_within_step, set_aside_unfinished
from shardsmith.manifest.retention import Retention

from .hook import Hook
from .live_directory import LiveDirectory, is_sound
from .live_source import Target
from .step_folder import StepFolder

log = logging.getLogger(__name__)


def prepare_folder(folder: Path, base: Path | None) -> list[int]:
    """Check that exports can be written to a folder and remove what dead attempts left; return their steps. Rank 0.

    Args:
        folder: Made if missing.
        base: The base model's directory, which no export may replace.

    Raises:
        UsageError: the folder is within a step of a run, or an export would replace the base model.
        WriteError: the folder cannot be written to.
    """
    if base is not None:
        # Any step stands for all: no export may go where the base model is.
        protect(folder / step_name(0), base)
    refuse_within_step(folder)
    check_writable(folder)
    # A directory that was swept names the step that a former run was exporting.
    steps = (unfinished_step(path.name) for path in sweep(folder))
    return sorted({step for step in steps if step is not None})


class ExportFolder:
    """The exported steps of a folder, of which each is one directory or two. No communication.

    Attributes:
        directories: The directories that a step becomes.
    """

    def __init__(
        self,
        folder: Path,
        directories: Sequence[LiveDirectory],
        keep: Retention | None,
        broken_off: Collection[int],
    ) -> None:
        """Remember what is where.

        Args:
            folder: Where the steps are.
            directories: The directories that a step becomes.
            keep: Which steps stay; None keeps all.
            broken_off: Steps that a former run was writing when it ended.

        Raises:
            UsageError: the policy looks at a disk, and there is none.
        """
        self.directories = directories
        self._folder = folder
        self._broken_off = broken_off
        suffixes = [directory.suffix for directory in directories]
        self._steps = StepFolder(folder, keep, marker=PROVENANCE_FILE, suffixes=suffixes)

    def targets(self, step: int) -> list[Target]:
        """Return the directories of a step, each with the place where it appears."""
        return [(one, self._folder / (step_name(step) + one.suffix)) for one in self.directories]

    def missing(self, step: int) -> list[int]:
        """Return the directories of the step, by number, that no earlier run of this training has left sound."""
        return [i for i, (_, path) in enumerate(self.targets(step)) if not is_sound(path)]

    def set_aside_unfinished(self, step: int) -> None:
        """Set aside what is no export and in the way of a run that goes on from a step; name the exports it lost."""
        # The step of the resume may be exported again, so it counts as one to come.
        for aside, reason in set_aside_unfinished(self._folder, step - 1, PROVENANCE_FILE).items():
            log.warning("%s was set aside: it %s, and its step is to come (again)", aside, reason)
        for lost in sorted(lost for lost in self._broken_off if lost < step and self.missing(lost)):
            words = "%s: the export of step %s was cut off with the former run, and this one goes on from step %s; "
            log.warning(words + "`shardsmith to-hf` makes it of a checkpoint", self._folder, lost, step)

    def note_policy(self) -> None:
        """Write down beside the steps which of them stay. Rank 0; raises nothing."""
        self._steps.note_policy()

    def remove_old(self, hook: Hook, spare: Collection[int] = ()) -> None:
        """Remove the steps that are not retained. Raises nothing.

        Args:
            hook: Whose steps these are.
            spare: Steps that something still reads.
        """
        self._steps.remove_old(hook, spare)
