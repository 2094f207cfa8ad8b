"""A checkpoint of any format with all its models open at once, its index read once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shardsmith.checking.arguments import checked
from shardsmith.checking.types import AsAnyPath
from shardsmith.errors import UnsupportedFormatError
from shardsmith.formats.by_path import DCP, SHARDED, KnownCheckpoint, known_checkpoint
from shardsmith.formats.dcp.beside_weights import open_step
from shardsmith.formats.dcp.source import DcpSource
from shardsmith.formats.models import ModelSource, models_of
from shardsmith.ground import layout
from shardsmith.manifest.metadata import CheckpointMetadata
from shardsmith.tensors.checkpoint_keys import MAIN, kind_of

Layout = Literal["flat", "nested"]


@dataclass(frozen=True, slots=True)
class OpenedCheckpoint:
    """An open checkpoint: its models and the content of its index."""

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
            return self.path.is_dir() and any(one.name.startswith("optim") for one in self.path.iterdir())
        keys = (*self.dcp.index.tensors, *self.dcp.index.objects)
        return any(kind_of(key.split(".", 1)[0]) in ("optimizer", "optim") for key in keys)

    def close(self) -> None:
        """Close the files."""
        for model in self.models.values():
            model.close()


@checked
def open_checkpoint(path: AsAnyPath) -> OpenedCheckpoint:
    """Open all models of a checkpoint. Reads names, headers and indexes; no weights.

    Raises:
        CheckpointNotFoundError: there is nothing at the path.
        UnsupportedFormatError: there are no weights in a format that we read.
        CheckpointError: it is half-written, damaged or unsafe.
    """
    known = known_checkpoint(path)
    names = known.models()
    # All models share one open source and so one index: known.open would read it once for each.
    if (path / layout.DCP_INDEX_FILE).exists():
        return _open_dcp(known)
    if not names:
        found = known.format
        raise UnsupportedFormatError(path, f"there are no weights to look at: {found.name} ({found.reason})")
    return OpenedCheckpoint(path, known.format.name, {name: known.open(name) for name in names}, None, None)


def _open_dcp(known: KnownCheckpoint) -> OpenedCheckpoint:
    manifest = known.manifest if known.is_ours else None
    source = open_step(known.path, manifest)
    models = models_of(source, {} if manifest is None else manifest.tied)
    if not models:
        raise UnsupportedFormatError(known.path, "is a DCP directory without a model of known names")
    return OpenedCheckpoint(known.path, SHARDED if known.is_ours else DCP, models, manifest, source)
