"""Which step of TorchTitan's checkpoint folder a run goes on from: the newest that is whole."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint._nested_dict import flatten_state_dict

from shardsmith.errors import CheckpointError, CorruptCheckpointError
from shardsmith.formats.dcp.index import read_index
from shardsmith.ground.layout import DCP_INDEX_FILE, METADATA_FILE, parse_step, step_name
from shardsmith.ground.ranks import Ranks
from shardsmith.manifest.checkpoints import find_damage, why_unreadable
from shardsmith.manifest.metadata import CheckpointMetadata

log = logging.getLogger(__name__)


class DamagedStepError(CorruptCheckpointError):
    """A step was loaded, and is not what was saved."""


@dataclass(frozen=True, slots=True)
class Found:
    """The step to load.

    Attributes:
        step: Its number; None if the folder has no step at all.
        recorded: Whether it has a manifest. TorchTitan without the hooks writes none.
    """

    step: int | None
    recorded: bool


def find_newest_whole(folder: Path, ranks: Ranks, passed: set[int], newest: int | None = None) -> Found:
    """The newest step whose files are all there with their sizes. Says in one line each what is wrong with newer ones.

    A step with a manifest has the files that it lists, in their sizes. TorchTitan writes .metadata last, so that a step
    without a manifest is whole if that is readable and the files that it names are there and long enough. All ranks
    call it; rank 0 looks.

    Args:
        folder: TorchTitan's checkpoint folder.
        ranks: All ranks of the job.
        passed: Steps that were found to be damaged before.
        newest: No step after this one counts; None: any.

    Raises:
        CorruptCheckpointError: there are finished steps, and each of them is damaged.
    """
    step, recorded, lines = ranks.lead(f"looking for a step in {folder}", lambda: _look(folder, passed, newest))
    if ranks.is_leader:
        for line in lines:
            log.warning("%s", line)
    return Found(step, recorded)


def _look(folder: Path, passed: set[int], newest: int | None) -> tuple[int | None, bool, list[str]]:
    found = (parse_step(path.name) for path in folder.glob("*"))
    steps = sorted((step for step in found if step is not None and (newest is None or step <= newest)), reverse=True)
    damaged: list[str] = []
    lines: list[str] = []
    for step in steps:
        path = folder / step_name(step)
        # It was loaded before in this process, and was damaged.
        if step in passed:
            damaged.append(f"{path.name}: was damaged")
        elif reason := why_unreadable(path):
            damaged.append(f"{path.name} {reason}")
            lines.append(f"{path} {reason}, and is passed over")
        elif not (path / DCP_INDEX_FILE).is_file():
            # A last step that TorchTitan has exported has no index, and is complete.
            lines += [] if _is_hugging_face(path) else [f"{path} was not saved to its end: it has no {DCP_INDEX_FILE}"]
        elif problem := _problem(path):
            damaged.append(f"{path.name}: {problem}")
            lines.append(f"{path} is damaged and passed over: {problem}")
        else:
            lines += [f"resuming from {path.name}"] if lines or passed else []
            return step, (path / METADATA_FILE).is_file(), lines
    if damaged:
        text = "\n  ".join(["no step can be resumed from", *damaged])
        advice = "Start anew in another folder, or give checkpoint.load_step and take one as it is"
        raise CorruptCheckpointError(folder, f"{text}\nNothing was loaded. {advice}.")
    return None, False, lines


def _problem(path: Path) -> str | None:
    """What is wrong with the files of a finished step, without reading them whole."""
    # Names and sizes; the contents are verified when they have been loaded.
    if (path / METADATA_FILE).is_file() and (damage := find_damage(path, contents=False)):
        return damage[0]
    try:  # bytes of the index that have changed are in files of the right size, and would end the load itself
        read_index(path)
    except CheckpointError as error:
        return " ".join(str(error).split())
    return None


def _is_hugging_face(path: Path) -> bool:
    """Whether TorchTitan has exported the last step in place of saving it."""
    return any(path.glob("*.safetensors"))


def only_recorded(state: dict[str, Any], metadata: CheckpointMetadata) -> dict[str, Any]:
    """Return the tensors of a nested state of which a manifest has the digest, by flat key."""
    return {key: value for key, value in flatten_state_dict(state)[0].items() if key in metadata.tensors}


def live_state(manager: Any, keys: list[str]) -> dict[str, Any]:
    """What a manager of TorchTitan holds now under the keys of a step; nested, as a save has it. No communication."""
    states = manager._flattened_model_states_sd()
    found = {key: states[key] for key in keys if key in states}
    return {key: value.state_dict() if hasattr(value, "state_dict") else value for key, value in found.items()}
