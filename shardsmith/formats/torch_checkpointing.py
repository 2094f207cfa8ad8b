"""Checkpoints of the library torch_checkpointing (PyPI: torch-checkpointing), to which TorchTitan is moving.

    step-500/
        metadata.pkl                     who wrote what, as numbers and texts; where items can be resharded
        model_0.pt  model_1.pt ...       an item's state dict of each rank, with DTensors that say where they belong
        optimizer_0.pt ...  train_state_0.pt ...

``metadata.pkl`` comes last, and is read without running code.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardsmith.errors import CheckpointError, CorruptCheckpointError, UnsafeCheckpointError, UnsupportedFormatError
from shardsmith.formats.detected import (
    INCOMPLETE,
    TORCH_CHECKPOINTING,
    UNKNOWN,
    DetectedFormat,
    FormatReader,
    reason_of,
)
from shardsmith.formats.models import ModelSource
from shardsmith.formats.torch_files.pickle_machine import read_pickle
from shardsmith.formats.torch_files.source import open_rank_files, rank_files_models
from shardsmith.ground.mapped import MappedFile
from shardsmith.tensors.checkpoint_keys import MAIN

METADATA_FILE = "metadata.pkl"
_MODEL = "model"
_MAX_BYTES = 1 << 28
_FILE = re.compile(r"model_(?P<rank>0|[1-9][0-9]{0,6})\.pt")
_OTHER_ITEM = re.compile(r"(optimizer|train_state|lr_scheduler|dataloader)_[0-9]+\.pt")


def detect_torch_checkpointing(path: Path) -> DetectedFormat | None:
    """Detect a checkpoint of the library; incomplete where files of some ranks are not there."""
    names = os.listdir(path)
    ranks = {int(match["rank"]) for name in names if (match := _FILE.fullmatch(name))}
    if not ranks or not (METADATA_FILE in names or any(map(_OTHER_ITEM.fullmatch, names))):
        return None
    try:
        files = _files(path, ranks)
        missing = [name for name in files if name not in names]
        if missing:
            return DetectedFormat(
                INCOMPLETE, f"{len(missing)} of {len(files)} files of its model are not there: {missing[0]}"
            )
        models = rank_files_models(path, files)
    except (UnsafeCheckpointError, UnsupportedFormatError) as error:
        return DetectedFormat(UNKNOWN, f"cannot be read: {reason_of(error, path)}")
    except CheckpointError as error:
        return DetectedFormat(INCOMPLETE, reason_of(error, path))
    what = f"{METADATA_FILE} and " if METADATA_FILE in names else ""
    return DetectedFormat(
        TORCH_CHECKPOINTING, f"{what}model files of {len(files)} ranks, with {', '.join(models) or 'no'} weights"
    )


def _files(path: Path, ranks: set[int]) -> list[str]:
    """The files of the model, rank by rank: as metadata.pkl says it, else as many as there must be."""
    # Without metadata.pkl the largest number of a rank is all that is known: later ranks may be missing, which their
    # DTensors then show.
    content = _read_metadata(path)
    if content is None:
        return [f"model_{rank}.pt" for rank in range(max(ranks) + 1)]
    try:
        items: Mapping[str, Any] = content["metadata"]
        size = content["world_size"]
        layouts = items[_MODEL]["rank_to_layout_info"] if _MODEL in items else {}
        # A bound, since a list of that length is made.
        if type(size) is not int or not 0 < size <= 1 << 20:
            raise TypeError(f"world size {size!r}")
        return [_file(path, rank, layouts.get(rank)) for rank in range(size)]
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptCheckpointError(path / METADATA_FILE, f"is damaged: {type(error).__name__}: {error}") from error


def _file(path: Path, rank: int, layout: Mapping[str, Any] | None) -> str:
    if layout is None:
        return f"model_{rank}.pt"
    name, form = layout["file_path"], layout["serialization_format"]["type"]
    # Path(name).name differs from name if it leads into another directory.
    if form != "TorchSerialization" or not isinstance(name, str) or Path(name).name != name:
        raise UnsupportedFormatError(
            path, f"its model is written by {form} as {name!r}; only files of torch.save are read"
        )
    return name


def _read_metadata(path: Path) -> Mapping[str, Any] | None:
    """The content of metadata.pkl; None without one. Raises CheckpointError if it is not made of plain values."""
    if not (path / METADATA_FILE).is_file():
        return None
    file = MappedFile(path / METADATA_FILE)
    if file.size > _MAX_BYTES:
        raise CorruptCheckpointError(file.path, f"has {file.size} bytes, which is more than is read")
    content = read_pickle(bytes(file.bytes(0, file.size)), file.path, frozenset())
    if not isinstance(content, dict):
        raise CorruptCheckpointError(file.path, "holds no dict")
    return content


def _models(path: Path) -> list[str]:
    return rank_files_models(path, _files(path, _ranks(path)))


def _open(path: Path, model: str = MAIN) -> ModelSource:
    return open_rank_files(path, _files(path, _ranks(path)), model)


def _ranks(path: Path) -> set[int]:
    return {int(match["rank"]) for name in os.listdir(path) if (match := _FILE.fullmatch(name))} or {0}


TORCH_CHECKPOINTING_READER = FormatReader.by_path(detect_torch_checkpointing, _models, _open)
