"""What ``last()`` asks for and a training that ended early has not done, in words."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence

from shardsmith.ground.layout import step_name
from shardsmith.ground.ranks import rank_and_size
from shardsmith.manifest.checkpoints import committed_steps

from .background import logged
from .export import HFExport
from .hook import Hook

log = logging.getLogger(__name__)


def warn_of_undone(hooks: Sequence[Hook], step: int) -> None:
    """Log in one line what the last step would have brought, and what can be done now. Rank 0; no communication.

    Nothing is logged where no hook has ``last()``, and before the first step.

    Args:
        hooks: All hooks of the run.
        step: The last step that was reported.
    """
    undone = [hook for hook in hooks if hook.when.at_last]
    if not undone or step < 1 or rank_and_size()[0] != 0:
        return
    with logged("saying what was not done"):  # it reads directories, and must not hide why the training ended
        names = ", ".join(f"{type(hook).__name__} in {hook.parts.directory}" for hook in undone)
        advice = _advice(hooks, [hook for hook in undone if isinstance(hook, HFExport)])
        log.warning(
            "the training ended early, after step %d: what last() asks for was not done (%s). %s", step, names, advice
        )


def _advice(hooks: Sequence[Hook], exports: Sequence[HFExport]) -> str:
    resume = "A run that resumes and comes to its end does it"
    if not exports:
        return resume
    export = exports[0]
    folders = [hook.parts.directory for hook in hooks if not isinstance(hook, HFExport)]
    found = [(step, folder) for folder in folders if folder is not None for step in committed_steps(folder)]
    step, folder = max(found, key=lambda each: each[0], default=(0, None))
    # TorchTitan's and Trainer's own folders are known to no hook.
    source, name = ("CHECKPOINT", "NAME") if folder is None else (str(folder / step_name(step)), step_name(step))
    command = ["shardsmith", "to-hf", "--checkpoint", source, "--output-dir", str(export.directory / name)]
    if export.base_model is not None:
        command += ["--base-model", str(export.base_model)]
    return f"{resume}. To export the newest checkpoint: {shlex.join(command)}"
