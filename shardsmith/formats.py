"""What a path holds, with the reason; and its weights as a ``TensorSource``, whatever the format."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from shardsmith import layout
from shardsmith.checkpoints import committed_steps, find_damage
from shardsmith.dcp_index import read_index
from shardsmith.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    IncompleteCheckpointError,
    UnsupportedFormatError,
)
from shardsmith.metadata import has_manifest, read_metadata
from shardsmith.model_keys import EMA, MAIN, find_models
from shardsmith.models import ModelSource, open_dcp_model
from shardsmith.safetensors_source import SafetensorsSource, open_safetensors_directory

SHARDED = "sharded"
"""Our own: a DCP directory with metadata.json."""
DCP = "dcp"
"""A directory of torch.distributed.checkpoint, by TorchTitan or a plain ``dcp.save``."""
HUGGINGFACE = "huggingface"
"""A directory with safetensors weights, single or indexed."""
SAFETENSORS = "safetensors"
"""One safetensors file."""
TORCH = "torch"
"""A file of ``torch.save``, or a directory with pytorch_model.bin."""
INCOMPLETE = "incomplete"
"""One of the above, half-written or damaged."""
UNKNOWN = "unknown"

_WEIGHTS_STEMS = {MAIN: layout.MAIN_WEIGHTS, EMA: layout.EMA_WEIGHTS}
_TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_TORCH_MAGICS = (b"PK\x03\x04", b"\x80\x02")


@dataclass(frozen=True, slots=True)
class DetectedFormat:
    """The format of a path and what it was recognised by."""

    name: str
    """One of the constants above."""
    reason: str
    """What was found, or what is missing."""


def detect_checkpoint_format(path: str | Path) -> DetectedFormat:
    """Find out what a file or directory holds. Reads names, headers and indexes, no weights; runs no code of it.

    Raises:
        CheckpointNotFoundError: there is nothing at the path.
    """
    path = Path(path)
    if path.is_dir():
        return _detect_directory(path)
    if path.is_file():
        return _detect_file(path)
    raise CheckpointNotFoundError(path, "there is no such file or directory")


def open_source(path: str | Path, model: str = MAIN) -> ModelSource:
    """Open the weights of one model, under the names that the model gives them; of tied ones, the kept name only.

    Args:
        path: Anything that ``detect_checkpoint_format`` knows.
        model: ``"main"`` or ``"ema"``. What an average does not cover (frozen weights, buffers) comes from main.

    Raises:
        IncompleteCheckpointError: files are missing or truncated, or tensors have holes.
        UnsupportedFormatError: not a format with weights that we read.
        CheckpointNotFoundError: nothing there, or not this model.
    """
    path = Path(path)
    found = _detect_readable(path)
    if found.name in (SHARDED, DCP):
        return open_dcp_model(path, model)
    if found.name == HUGGINGFACE:
        return ModelSource.whole(open_safetensors_directory(path, _WEIGHTS_STEMS[model]))
    if found.name == SAFETENSORS and model == MAIN:
        return ModelSource.whole(SafetensorsSource(path))
    raise UnsupportedFormatError(path, f"cannot read {model} weights from it: {found.name} ({found.reason})")


def model_names(path: str | Path) -> list[str]:
    """Which of ``main`` and ``ema`` a checkpoint holds; none where there are no weights in a format that we read.

    Raises:
        CheckpointNotFoundError: there is nothing at the path.
        CheckpointError: it is half-written or damaged, or its index cannot be read.
    """
    path = Path(path)
    found = _detect_readable(path).name
    if found in (SHARDED, DCP):
        index = read_index(path)
        return list(find_models(index.tensors, index.containers))
    if found == HUGGINGFACE:
        return [model for model, stem in _WEIGHTS_STEMS.items() if _weights(path, stem)]
    return [MAIN] if found == SAFETENSORS else []


def _detect_readable(path: Path) -> DetectedFormat:
    """The format, unless it is clear that the weights cannot be read from there: then the error that says why."""
    found = detect_checkpoint_format(path)
    if found.name == UNKNOWN and (path / layout.DCP_INDEX_FILE).exists():
        read_index(path)
    if found.name == INCOMPLETE:
        raise IncompleteCheckpointError(path, found.reason)
    return found


def _reason(error: CheckpointError, path: Path) -> str:
    """What an error says, without the path that whoever asked knows."""
    return str(error).removeprefix(f"{path}: ").removeprefix(f"{path}{os.sep}")


def _detect_directory(path: Path) -> DetectedFormat:
    if layout.is_leftover(path.name):
        return DetectedFormat(INCOMPLETE, "its name says that it was being written or deleted")
    if (path / layout.DCP_INDEX_FILE).exists():
        return _detect_sharded(path) if has_manifest(path) else _detect_dcp(path)
    names = sorted(os.listdir(path))
    if shards := [name for name in names if name.endswith(".distcp")]:
        return DetectedFormat(INCOMPLETE, f"{len(shards)} .distcp files without {layout.DCP_INDEX_FILE}")
    if any(_weights(path, stem) for stem in _WEIGHTS_STEMS.values()):
        return _detect_huggingface(path)
    if torch_files := [name for name in names if name.startswith("pytorch_model") and name.endswith(".bin")]:
        return DetectedFormat(TORCH, ", ".join(torch_files))
    if steps := committed_steps(path):
        newest = path / layout.step_name(steps[-1])
        return DetectedFormat(UNKNOWN, f"a folder of {len(steps)} checkpoints; name one of them, such as {newest}")
    return DetectedFormat(UNKNOWN, f"none of its {len(names)} entries is a weights file or an index that we know")


def _detect_sharded(path: Path) -> DetectedFormat:
    try:
        metadata = read_metadata(path)
    except UnsupportedFormatError as error:
        return DetectedFormat(UNKNOWN, _reason(error, path))
    except CheckpointError as error:
        return DetectedFormat(INCOMPLETE, _reason(error, path))
    if damage := find_damage(path, contents=False):
        return DetectedFormat(INCOMPLETE, "; ".join(damage))
    return DetectedFormat(SHARDED, f"{layout.METADATA_FILE} of step {metadata.step}, {', '.join(metadata.models)}")


def _detect_dcp(path: Path) -> DetectedFormat:
    try:
        index = read_index(path)
    except IncompleteCheckpointError as error:
        return DetectedFormat(INCOMPLETE, _reason(error, path))
    except CheckpointError as error:
        return DetectedFormat(UNKNOWN, f"its index cannot be read: {_reason(error, path)}")
    return DetectedFormat(
        DCP, f"{layout.DCP_INDEX_FILE} lists {len(index.tensors)} tensors in {len(index.files)} files"
    )


def _detect_huggingface(path: Path) -> DetectedFormat:
    found = []
    for stem in _WEIGHTS_STEMS.values():
        if _weights(path, stem):
            try:
                source = open_safetensors_directory(path, stem)
            except CheckpointError as error:
                return DetectedFormat(INCOMPLETE, _reason(error, path))
            found.append(f"{len(source.specs)} tensors in {', '.join(source.headers)}")
            source.close()
    return DetectedFormat(HUGGINGFACE, "; ".join(found))


def _weights(path: Path, stem: str) -> bool:
    """Whether a directory has a single weights file or an index of that stem."""
    return any((path / name).is_file() for name in (*layout.shard_file_names(stem, 1), layout.index_file_name(stem)))


def _detect_file(path: Path) -> DetectedFormat:
    if path.suffix == ".safetensors":
        try:
            source = SafetensorsSource(path)
        except CheckpointError as error:
            return DetectedFormat(INCOMPLETE, _reason(error, path))
        source.close()
        return DetectedFormat(SAFETENSORS, f"a header of {len(source.specs)} tensors")
    with path.open("rb") as file:
        magic = file.read(4)
    if path.suffix in _TORCH_SUFFIXES and magic.startswith(_TORCH_MAGICS):
        return DetectedFormat(TORCH, f"a {path.suffix} file that begins like one of torch.save")
    return DetectedFormat(UNKNOWN, f"a file that begins with {magic!r}")
