"""What we add to a checkpoint folder that a trainer wrote: an average, and a record of what the trainer put there.

    checkpoint-500/             the trainer's; its files are left as they are
        shardsmith/             ours; it appears by a rename, when both parts are on disk
            .metadata *.distcp  a DCP directory: ema_model.*, ema_state.*
            metadata.json       of this directory
            folder.json         the trainer's files with a hash each; a digest of each of the live model's tensors

A folder without ``shardsmith/`` is not complete for us, and the trainer does not care.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from shardsmith.errors import CheckpointError, CorruptCheckpointError
from shardsmith.ground import layout
from shardsmith.manifest.checkpoints import file_damage, find_damage
from shardsmith.manifest.compared import ComparedBytes
from shardsmith.manifest.fields import count, typed
from shardsmith.manifest.metadata import (
    CheckpointMetadata,
    FileRecord,
    TensorRecord,
    file_record,
    read_json,
    sealed_json,
    tensor_record,
)

SCHEMA_VERSION = 1
_TRAINER_STATE, _TRAINER_NAME = "trainer_state.json", re.compile(r"checkpoint-([0-9]+)")
_WEIGHTS = ("model", "pytorch_model", "adapter_model")
"""How the names of files and directories with a model's weights begin, by transformers, peft and accelerate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderRecord:
    """The content of ``folder.json``: what a trainer's folder held when our directory was added to it."""

    step: int
    """Optimizer steps done."""
    files: dict[str, FileRecord]
    """The trainer's files, by path in the folder."""
    tensors: dict[str, TensorRecord]
    """The model as it trained, by clean FQN: what a load of the folder has to give back."""

    def to_json(self) -> bytes:
        """As the bytes of the file."""
        content = {"step": self.step, "files": self.files, "tensors": self.tensors}
        return sealed_json({"schema_version": SCHEMA_VERSION, **content})


def companion_of(folder: Path) -> Path:
    """Our directory in a trainer's folder."""
    return folder / layout.COMPANION


def is_complete(folder: Path) -> bool:
    """Return whether our directory is there; without looking whether anything was damaged since."""
    return (companion_of(folder) / layout.METADATA_FILE).is_file()


def is_deserted(folder: Path) -> bool:
    """Return whether a trainer's folder is gone, or nothing is left in it but what is ours."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return True
    return all(name == layout.COMPANION or layout.is_leftover(name) for name in names)


def read_folder_record(folder: Path) -> FolderRecord:
    """Read ``folder.json`` of a trainer's folder.

    Raises:
        CheckpointNotFoundError: there is none.
        CorruptCheckpointError: it is not what ``to_json`` writes.
    """
    path = companion_of(folder) / layout.FOLDER_FILE
    content = read_json(path, sealed=True)
    try:
        if content["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema version {content['schema_version']!r}, this version reads {SCHEMA_VERSION}")
        return _parse(content)
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptCheckpointError(path, f"is damaged: {type(error).__name__}: {error}") from error


def find_folder_damage(
    folder: Path,
    *,
    contents: bool = True,
    weights_only: bool = False,
    part: int = 0,
    parts: int = 1,
    manifest: CheckpointMetadata | None = None,
    compared: ComparedBytes | None = None,
) -> list[str]:
    """Return what is wrong with a trainer's folder and our directory in it, one line each; empty if nothing is.

    Args:
        folder: The trainer's folder.
        contents: Also read every file and compare its hash; otherwise only presence and size.
        weights_only: Of the trainer's files look only at those with the model's weights; the optimizer may be gone.
        part: Which share of the files to look at, so that ranks can divide them. No communication.
        parts: Into how many shares.
        manifest: The metadata.json of our directory, if that was read already.
        compared: Where to count the bytes that were compared.
    """
    ours = companion_of(folder)
    try:
        record = read_folder_record(folder)
    except CheckpointError as error:
        return [str(error)]
    if record.step != (named := _step_in_name(folder, record.step)):
        return [f"{layout.FOLDER_FILE} is of step {record.step}, not of step {named}: it was copied or renamed"]
    files = record.files
    # All ranks list in the same order and take every parts-th file.
    chosen = [name for name in files if not weights_only or name.startswith(_WEIGHTS)][part::parts]
    with ThreadPoolExecutor(_threads(chosen), "shardsmith-verify") as pool:
        problems = pool.map(
            lambda name: file_damage(folder / name, files[name], contents=contents, compared=compared), chosen
        )
        theirs = [f"{name}: {problem}" for name, problem in zip(chosen, problems, strict=True) if problem]
    return theirs + [
        f"{layout.COMPANION}/{line}"
        for line in find_damage(ours, contents=contents, part=part, parts=parts, manifest=manifest, compared=compared)
    ]


def _step_in_name(folder: Path, default: int) -> int:
    """The step that Trainer has named a folder for; ``default`` where the name is not Trainer's."""
    found = _TRAINER_NAME.fullmatch(folder.resolve().name) if (folder / _TRAINER_STATE).is_file() else None
    return int(found[1]) if found else default


def _threads(names: list[str]) -> int:
    return max(1, min(len(names), os.cpu_count() or 1))


def _parse(content: Mapping[str, Any]) -> FolderRecord:
    for name in typed(content["files"], dict):
        path = PurePosixPath(name)
        # A record may come from a stranger, and each of these files will be read.
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{name!r} is not the name of a file in the folder")
    return FolderRecord(
        step=count(content["step"]),
        files={name: file_record(record) for name, record in content["files"].items()},
        tensors={name: tensor_record(record) for name, record in typed(content["tensors"], dict).items()},
    )
