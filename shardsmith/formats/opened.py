"""A checkpoint of any format with all its models open at once, its index read once."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shardsmith.errors import IncompleteCheckpointError, UnsupportedFormatError
from shardsmith.formats.by_path import DCP, SHARDED, detect_checkpoint_format, model_names, open_source
from shardsmith.formats.dcp.source import DcpSource
from shardsmith.formats.models import ModelSource, models_of
from shardsmith.ground import layout
from shardsmith.manifest.metadata import CheckpointMetadata, has_manifest, read_metadata
from shardsmith.tensors.checkpoint_keys import MAIN

Layout = Literal["flat", "nested"]


@dataclass(frozen=True, slots=True)
class OpenedCheckpoint:
    """A checkpoint, and what its index tells."""

    path: Path
    format: str
    """As ``detect_checkpoint_format`` names it."""
    models: dict[str, ModelSource]
    """``main``, ``ema``."""
    metadata: CheckpointMetadata | None
    """Of a checkpoint of ours."""
    dcp: DcpSource | None
    """All of a DCP directory, models and other."""

    @property
    def layout(self) -> Layout | None:
        """Whether the model's tensors lie at the top of a DCP directory or in a dict of their own."""
        if self.dcp is None or MAIN not in self.models:
            return None
        return "nested" if any(name != key for name, key in self.models[MAIN].keys.items()) else "flat"

    @property
    def has_optimizer(self) -> bool:
        """Whether an optimizer's state lies beside the model, so that it was trained."""
        if self.dcp is None:
            return self.path.is_dir() and any(name.startswith("optim") for name in os.listdir(self.path))
        keys = (*self.dcp.index.tensors, *self.dcp.index.objects)
        return any(key.split(".", 1)[0] in ("optimizer", "optim") for key in keys)

    def close(self) -> None:
        """Let go of the files."""
        for model in self.models.values():
            model.close()


def open_checkpoint(path: Path) -> OpenedCheckpoint:
    """Open all models of a checkpoint. Reads names, headers and indexes; no weights.

    Raises:
        CheckpointNotFoundError: there is nothing at the path.
        UnsupportedFormatError: there are no weights in a format that we read.
        CheckpointError: it is half-written, damaged or unsafe.
    """
    if (path / layout.DCP_INDEX_FILE).exists():
        return _open_dcp(path)
    names = model_names(path)
    found = detect_checkpoint_format(path)
    if not names:
        raise UnsupportedFormatError(path, f"there are no weights to look at: {found.name} ({found.reason})")
    return OpenedCheckpoint(path, found.name, {name: open_source(path, name) for name in names}, None, None)


def _open_dcp(path: Path) -> OpenedCheckpoint:
    ours = has_manifest(path)
    if ours or layout.is_leftover(path.name):
        found = detect_checkpoint_format(path)
        if found.name != SHARDED:
            raise IncompleteCheckpointError(path, found.reason)
    source = DcpSource(path)
    models = models_of(source)
    if not models:
        raise UnsupportedFormatError(path, "is a DCP directory without a model that we know")
    return OpenedCheckpoint(path, SHARDED if ours else DCP, models, read_metadata(path) if ours else None, source)
