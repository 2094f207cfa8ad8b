"""Directories of torch.distributed.checkpoint: ours, plain ones, and those in a folder of accelerate's."""

from __future__ import annotations

import os
import re
from pathlib import Path

from shardsmith.errors import CheckpointError, IncompleteCheckpointError, UnsupportedFormatError
from shardsmith.formats.dcp.beside_weights import open_step
from shardsmith.formats.dcp.index import DcpIndex, read_index
from shardsmith.formats.detected import (
    ACCELERATE,
    DCP,
    INCOMPLETE,
    SHARDED,
    UNKNOWN,
    DetectedFormat,
    FormatReader,
    reason_of,
)
from shardsmith.formats.models import ModelSource, choose_model, open_dcp_model
from shardsmith.formats.rank_shards import RankShards
from shardsmith.formats.torch_files.files import read_torch_file
from shardsmith.formats.torch_files.source import is_of_lightning_average
from shardsmith.ground import layout
from shardsmith.manifest.checkpoints import find_damage
from shardsmith.manifest.metadata import find_metadata, read_metadata
from shardsmith.tensors.checkpoint_keys import MAIN, find_models

_ACCELERATE_MODEL = re.compile(r"pytorch_model_fsdp_(0|[1-9][0-9]*)")
ACCELERATE_MAIN = "pytorch_model_fsdp_0"
"""Where accelerate saves the first model that it prepared."""
_LIGHTNING_REST = "meta.pt"
"""What Lightning has beside the model and its optimizers, as rank 0 has it."""
_OF_AN_AVERAGE = (
    f"its shards hold the average of Lightning's WeightAveraging, and the weights that train are in {_LIGHTNING_REST}, "
    "as far as rank 0 has them. Lightning does not support that callback with sharded models: train with "
    "CheckpointHooks(ema_decay=...) of shardsmith.integrations.lightning, or without the callback"
)


def detect_ours(path: Path) -> DetectedFormat | None:
    """A directory with a metadata.json of ours, whatever else is there."""
    if not (path / layout.METADATA_FILE).exists():
        return None
    try:
        metadata = find_metadata(path)
    except UnsupportedFormatError as error:
        return DetectedFormat(UNKNOWN, reason_of(error, path))
    except CheckpointError as error:
        return DetectedFormat(INCOMPLETE, reason_of(error, path))
    if metadata is None:
        return None
    if damage := find_damage(path, contents=False, manifest=metadata):
        return DetectedFormat(INCOMPLETE, "; ".join(damage))
    reason = f"{layout.METADATA_FILE} of step {metadata.step}, {', '.join(metadata.models)}"
    return DetectedFormat(SHARDED, reason, metadata)


def detect_dcp(path: Path) -> DetectedFormat | None:
    """Return a directory with an index of torch's, or with shards that lack one."""
    if not (path / layout.DCP_INDEX_FILE).exists():
        shards = [name for name in os.listdir(path) if name.endswith(".distcp")]
        missing = f"{len(shards)} .distcp files without {layout.DCP_INDEX_FILE}"
        return DetectedFormat(INCOMPLETE, missing) if shards else None
    try:
        index = read_index(path)
    except IncompleteCheckpointError as error:
        return DetectedFormat(INCOMPLETE, reason_of(error, path))
    except CheckpointError as error:
        return DetectedFormat(UNKNOWN, f"its index cannot be read: {reason_of(error, path)}")
    if _is_average(path):
        return DetectedFormat(UNKNOWN, _OF_AN_AVERAGE)
    return DetectedFormat(DCP, _describe(index))


def detect_accelerate(path: Path) -> DetectedFormat | None:
    """Return a folder of which a model is a DCP directory; ``optimizer_0`` beside it is left alone."""
    found = sorted(name for name in os.listdir(path) if _ACCELERATE_MODEL.fullmatch(name) and (path / name).is_dir())
    if not found:
        return None
    if ACCELERATE_MAIN not in found:
        return DetectedFormat(INCOMPLETE, f"{', '.join(found)} without {ACCELERATE_MAIN}")
    inner = detect_dcp(path / ACCELERATE_MAIN)
    if inner is None:
        return DetectedFormat(INCOMPLETE, f"{ACCELERATE_MAIN} is no directory of torch.distributed.checkpoint")
    others = f"; not read, as other models by their names: {', '.join(found[1:])}" if len(found) > 1 else ""
    name = ACCELERATE if inner.name == DCP else inner.name
    return DetectedFormat(name, f"{ACCELERATE_MAIN}: {inner.reason}{others}")


def _is_average(path: Path) -> bool:
    """Whether Lightning's WeightAveraging has put the average where the model is otherwise."""
    try:
        held = read_torch_file(path / _LIGHTNING_REST)
    # Without such a file, or with one that holds what is not read, nothing says so.
    except CheckpointError:
        return False
    return is_of_lightning_average([*held, ("state_dict", "")])


def dcp_models(path: Path) -> list[str]:
    """Return which models the index of a DCP directory names."""
    index = read_index(path)
    return list(find_models(index.tensors, index.containers))


def _describe(index: DcpIndex) -> str:
    main = find_models(index.tensors, index.containers).get(MAIN, {})
    where = " nested under model" if any(fqn != key for fqn, key in main.items()) else ""
    keys = set(main.values())
    beside = sorted({str(path[0]).split(".")[0] for key, path in index.containers.items() if key not in keys})
    more = f"; beside the model {', '.join(beside)}" if main and beside else ""
    return (
        f"{layout.DCP_INDEX_FILE} lists {len(index.tensors)} tensors in {len(index.files)} files, "
        f"{len(main)} of a model{where}{more}"
    )


def _open_accelerate(path: Path, model: str) -> ModelSource:
    return open_dcp_model(path / ACCELERATE_MAIN, model)


def _open_ours(path: Path, model: str, found: DetectedFormat) -> ModelSource:
    """From a DCP directory, or from files of single ranks."""
    manifest = found.manifest or read_metadata(path)
    if (path / layout.DCP_INDEX_FILE).exists():
        source = open_step(path, manifest)
        return choose_model(source, source.index.containers, model, manifest.tied)
    return choose_model(RankShards(path, manifest), {}, model, manifest.tied)


def _our_models(path: Path, found: DetectedFormat) -> list[str]:
    manifest = found.manifest or read_metadata(path)
    if (path / layout.DCP_INDEX_FILE).exists() and manifest.weights is None:
        return dcp_models(path)
    return list(manifest.models)


OURS_READER = FormatReader(detect_ours, _our_models, _open_ours)
DCP_READER = FormatReader.by_path(detect_dcp, dcp_models, open_dcp_model)
ACCELERATE_READER = FormatReader.by_path(
    detect_accelerate, lambda path: dcp_models(path / ACCELERATE_MAIN), _open_accelerate
)
