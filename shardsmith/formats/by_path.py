"""What a path holds, with the reason; and its weights as a ``TensorSource``, whatever the format."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from shardsmith.checking.arguments import checked
from shardsmith.checking.types import AnyPath
from shardsmith.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    IncompleteCheckpointError,
    UnsupportedFormatError,
)
from shardsmith.formats.bagel import BAGEL_READER, FORK_READER
from shardsmith.formats.dcp.index import read_index
from shardsmith.formats.dcp_reader import ACCELERATE_READER, DCP_READER, OURS_READER
from shardsmith.formats.deepspeed import why_no_weights
from shardsmith.formats.detected import (
    ACCELERATE,
    BAGEL,
    BAGEL_SHARDED,
    DCP,
    HUGGINGFACE,
    INCOMPLETE,
    RANK_FILES,
    SAFETENSORS,
    SHARDED,
    TORCH,
    UNKNOWN,
    DetectedFormat,
    FormatReader,
)
from shardsmith.formats.files import FILE_READER, HUGGINGFACE_READER, TORCH_READER
from shardsmith.formats.models import ModelSource
from shardsmith.formats.rank_files import RANK_FILES_READER
from shardsmith.formats.torch_checkpointing import TORCH_CHECKPOINTING_READER
from shardsmith.formats.trainer import trainer_reader
from shardsmith.ground import layout
from shardsmith.ground.path_advice import not_there, reading
from shardsmith.ground.remote_path import RemotePath, as_path
from shardsmith.manifest.checkpoints import committed_steps, why_unreadable
from shardsmith.manifest.metadata import CheckpointMetadata
from shardsmith.tensors.checkpoint_keys import MAIN

__all__ = [
    "ACCELERATE",
    "BAGEL",
    "BAGEL_SHARDED",
    "DCP",
    "HUGGINGFACE",
    "INCOMPLETE",
    "RANK_FILES",
    "SAFETENSORS",
    "SHARDED",
    "TORCH",
    "UNKNOWN",
    "DetectedFormat",
    "KnownCheckpoint",
    "detect_checkpoint_format",
    "known_checkpoint",
    "model_names",
    "open_source",
]

# Ours before DCP, since a step of ours is a DCP directory, too; the fork before the Hugging Face files that it has.
_WITHOUT_OURS = (
    OURS_READER,
    DCP_READER,
    FORK_READER,
    ACCELERATE_READER,
    BAGEL_READER,
    HUGGINGFACE_READER,
    TORCH_READER,
    TORCH_CHECKPOINTING_READER,
    RANK_FILES_READER,
)
_DIRECTORIES = (trainer_reader(_WITHOUT_OURS), *_WITHOUT_OURS)
"""The first that knows a directory has it: weights of their own before what lies beside them."""
_STEP = re.compile(r"(step-|checkpoint-)?(?P<step>[0-9]+)")


@dataclass(frozen=True, slots=True)
class KnownCheckpoint:
    """A path whose format is known: its models are opened without detecting it again, its manifest is read once."""

    path: Path
    format: DetectedFormat
    reader: FormatReader | None
    """What reads it; None where nothing does."""

    @property
    def manifest(self) -> CheckpointMetadata | None:
        """Content of metadata.json: of a checkpoint of ours, or of our directory in a trainer's folder."""
        return self.format.manifest

    @property
    def is_ours(self) -> bool:
        """Whether the checkpoint itself is one of ours."""
        return self.format.name == SHARDED

    def models(self) -> list[str]:
        """Return which of ``main`` and ``ema`` it holds. Raises as ``model_names``."""
        reader = self._readable()
        return reader.models(self.path, self.format) if reader else []

    def open(self, model: str = MAIN) -> ModelSource:
        """Open the weights of one model. Args and errors as ``open_source``."""
        reader = self._readable()
        if reader is None:
            why = f"cannot read {model} weights from it: {self.format.name} ({self.format.reason})"
            raise UnsupportedFormatError(self.path, why)
        return reader.open(self.path, model, self.format)

    def _readable(self) -> FormatReader | None:
        """The reader, unless it is clear that the weights cannot be read from there: then the error that says why."""
        if self.format.name == UNKNOWN and (self.path / layout.DCP_INDEX_FILE).exists():
            read_index(self.path)
        if self.format.name == INCOMPLETE:
            raise IncompleteCheckpointError(self.path, self.format.reason)
        return None if self.format.name == UNKNOWN else self.reader


def known_checkpoint(path: str | Path | KnownCheckpoint) -> KnownCheckpoint:
    """Detect the format of a path, once: a ``KnownCheckpoint`` is returned as it is.

    Raises:
        CheckpointNotFoundError: there is nothing at the path.
        CheckpointError: the operating system cannot read it.
    """
    if isinstance(path, KnownCheckpoint):
        return path
    place = as_path(path)
    return KnownCheckpoint(place, *_detect(place))


@checked
def detect_checkpoint_format(path: AnyPath) -> DetectedFormat:
    """Find out what a file or directory holds. Reads names, headers and indexes, no weights; runs no code of it.

    Raises:
        CheckpointNotFoundError: there is nothing at the path.
        CheckpointError: the operating system cannot read it.
    """
    return _detect(as_path(path))[0]


def open_source(path: str | Path | KnownCheckpoint, model: str = MAIN) -> ModelSource:
    """Open the weights of one model, under the names that the model gives them; of tied ones, the kept name only.

    Args:
        path: Anything that ``detect_checkpoint_format`` knows.
        model: ``"main"`` or ``"ema"``; ``"ema:NAME"`` where a DCP directory has several averages. What an average does
            not cover (frozen weights, buffers) comes from main.

    Raises:
        IncompleteCheckpointError: files are missing or truncated, or tensors have holes.
        UnsupportedFormatError: not a format with weights that we read.
        CheckpointNotFoundError: nothing there, or not this model.
    """
    return known_checkpoint(path).open(model)


def model_names(path: str | Path | KnownCheckpoint) -> list[str]:
    """Which of ``main`` and ``ema`` a checkpoint holds; none where there are no weights in a format that we read.

    Raises:
        CheckpointNotFoundError: there is nothing at the path.
        CheckpointError: it is half-written or damaged, or its index cannot be read.
    """
    return known_checkpoint(path).models()


def _detect(path: Path) -> tuple[DetectedFormat, FormatReader | None]:
    """The format, and what reads it: None where nothing does."""
    if isinstance(path, RemotePath):
        return _detect_remote(path)
    with reading(path):
        return _detect_local(path)


def _detect_local(path: Path) -> tuple[DetectedFormat, FormatReader | None]:
    if path.is_dir():
        # By the name and before any reader: such a directory may look complete and be deleted the next moment.
        if layout.is_leftover(path.name):
            return DetectedFormat(INCOMPLETE, "its name says that it was being written or deleted"), None
        for reader in _DIRECTORIES:
            if (found := reader.detect(path)) is not None:
                return found, reader
        return DetectedFormat(UNKNOWN, _what_else(path)), None
    if path.is_file():
        found = FILE_READER.detect(path)
        assert found is not None, "a file is always something"
        return found, FILE_READER
    raise not_there(path)


def _detect_remote(path: RemotePath) -> tuple[DetectedFormat, FormatReader | None]:
    """Of what is in an object store our steps and exports are read, and other directories of safetensors files."""
    # A store has no directories of its own: what a path is shows only in the objects below it.
    for reader in (OURS_READER, HUGGINGFACE_READER):
        if (found := reader.detect(path)) is not None:
            return found, reader
    if path.suffix == ".safetensors" and path.is_file():
        found = FILE_READER.detect(path)
        assert found is not None, "a file is always something"
        return found, FILE_READER
    steps = committed_steps(path)
    if steps:
        newest = path / layout.step_name(steps[-1])
        reason = f"the place of {len(steps)} checkpoints; name one of them, such as {newest}"
        return DetectedFormat(UNKNOWN, reason), None
    if not path.exists():
        raise CheckpointNotFoundError(path, "there is nothing of that name")
    reason = "in an object store only steps of Shardsmith and safetensors files are read; copy it to a disk"
    return DetectedFormat(UNKNOWN, reason), None


_MOST_LOOKED_INTO = 50
"""Names in a directory of no known format that may be a checkpoint, as a folder or a file."""
_BESIDE_WEIGHTS = ("optimizer", "scheduler", "rng_state", "random_states", "scaler", "sampler", "training_args")
"""How files with other states of a run begin, as Trainer and accelerate write them; they hold tensors, too."""
_WEIGHT_FILES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
_OF_A_VARIANT = re.compile(
    rf"({layout.MAIN_WEIGHTS}|{layout.COMPONENT_WEIGHTS}|pytorch_model)\.(?P<variant>[^.]+?)(-\d{{5}}-of-\d{{5}})?"
    r"\.(safetensors|bin)"
)


def _what_else(path: Path) -> str:
    """What may have been meant by a directory that is no checkpoint."""
    names = os.listdir(path)
    matches = (match for match in map(_STEP.fullmatch, names) if match)
    steps = {int(match["step"]): match[0] for match in matches if why_unreadable(path / match[0]) is None}
    known = [steps[step] for step in sorted(steps) if _is_known(path / steps[step])]
    if known:
        return f"a folder of {len(known)} checkpoints; name one of them, such as {path / known[-1]}"
    if adapter := next((name for name in _ADAPTERS if name in names), None):
        cure = f"to-hf --checkpoint {path / adapter} --adapters merged --base-model BASE makes one of it"
        return f"an adapter of peft, which is no model by itself; {cure}"
    if (reason := why_no_weights(path)) is not None:
        return reason
    if ranks := [name for name in sorted(names) if name.startswith("mp_rank_")]:
        return (
            f"the {len(ranks)} rank folders of a checkpoint of Megatron, such as {ranks[0]}, which are not read; "
            "export_ckpt of AutoBridge in Megatron Bridge writes a Hugging Face directory"
        )
    if variant := next(filter(None, map(_OF_A_VARIANT.fullmatch, sorted(names))), None):
        cure = f"from_pretrained({str(path)!r}, variant={variant['variant']!r}).save_pretrained(NEW)"
        return f"weights of a variant alone, such as {variant[0]}; {cure} of its class makes a directory that is read"
    if inside := [path / name for name in sorted(names)[:_MOST_LOOKED_INTO] if _has_weights(path / name)]:
        return f"no checkpoint itself, but the place of one or more; name one: {', '.join(map(str, inside))}"
    return f"none of its {len(names)} entries is a weights file or an index of a known format"


def _has_weights(path: Path) -> bool:
    """Whether a file, or a directory itself and not further down, can be read and has a model."""
    try:
        if path.suffix in _WEIGHT_FILES and path.is_file() and not path.name.startswith(_BESIDE_WEIGHTS):
            found = FILE_READER.detect(path)
            return found is not None and bool(FILE_READER.models(path, found))
        if path.is_dir() and why_unreadable(path) is None:
            for reader in _DIRECTORIES:
                if (found := reader.detect(path)) is not None:
                    return bool(reader.models(path, found))
    except (CheckpointError, OSError):  # what cannot be read is not what was meant
        pass
    return False


def _is_known(path: Path) -> bool:
    return any(reader.detect(path) is not None for reader in _DIRECTORIES)
