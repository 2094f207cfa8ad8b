"""Names of the checkpoint formats, the result of a detection, and what reads a format."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from shardsmith.errors import CheckpointError
from shardsmith.formats.models import ModelSource
from shardsmith.manifest.metadata import CheckpointMetadata

SHARDED = "sharded"
"""Our own: metadata.json, and shards in a DCP directory or a file a rank."""
DCP = "dcp"
"""A directory of torch.distributed.checkpoint, by TorchTitan, flame or a plain ``dcp.save``."""
ACCELERATE = "accelerate"
"""A folder with ``pytorch_model_fsdp_0/``, by accelerate or the Trainer of transformers."""
BAGEL_SHARDED = "bagel-sharded"
"""A step of a sharded fork of BAGEL: ``model_sharded/`` or ``model_rank*.pt``, and a metadata.json that is not ours."""
BAGEL = "bagel"
"""A step as BAGEL itself saves it: whole weights in safetensors, a part of the optimizer a rank."""
HUGGINGFACE = "huggingface"
"""A directory with safetensors weights, single or indexed."""
SAFETENSORS = "safetensors"
"""One safetensors file."""
TORCH = "torch"
"""A file of ``torch.save``, or a directory with pytorch_model.bin or model.pt."""
RANK_FILES = "rank-files"
"""A folder with a ``torch.save`` file of each rank's own shards, by verl or a script."""
TORCH_CHECKPOINTING = "torch-checkpointing"
"""A step of the library torch_checkpointing: ``model_0.pt`` and so on, and ``metadata.pkl``."""
INCOMPLETE = "incomplete"
"""One of the above, half-written or damaged."""
UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class DetectedFormat:
    """Format of a path, and how it was detected."""

    name: str
    """One of the constants above."""
    reason: str
    """What was found, or what is missing."""
    manifest: CheckpointMetadata | None = field(default=None, compare=False, repr=False)
    """The metadata.json that was read: of a checkpoint of ours, or of the directory in a trainer's folder."""
    inside: tuple[DetectedFormat, FormatReader] | None = field(default=None, compare=False, repr=False)
    """Format and reader of the trainer's own files, where our directory lies beside them."""


@dataclass(frozen=True, slots=True)
class FormatReader:
    """How one kind of checkpoint is detected and read."""

    detect: Callable[[Path], DetectedFormat | None]
    """None where the path is of another kind. May answer that it is an incomplete one of this kind."""
    models: Callable[[Path, DetectedFormat], list[str]]
    """Which of ``main`` and ``ema`` it holds; from the path and the answer of ``detect``."""
    open: Callable[[Path, str, DetectedFormat], ModelSource]
    """The weights of one of them."""

    @classmethod
    def by_path(
        cls,
        detect: Callable[[Path], DetectedFormat | None],
        models: Callable[[Path], list[str]],
        open_model: Callable[[Path, str], ModelSource],
    ) -> FormatReader:
        """Return a reader of a format that has no manifest of ours: the path is all that it needs."""
        return cls(detect, lambda path, _: models(path), lambda path, model, _: open_model(path, model))


def reason_of(error: CheckpointError, path: Path) -> str:
    """Return what an error says, without the path that whoever asked knows."""
    return str(error).removeprefix(f"{path}: ").removeprefix(f"{path}{os.sep}")
