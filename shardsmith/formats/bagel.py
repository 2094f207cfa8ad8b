"""Steps as BAGEL saves them (whole weights in safetensors), and as a sharded fork of it does.

    0001000/                      BAGEL                      0001000/                    the fork
        model.safetensors                                        metadata.json
        ema.safetensors                                          model_sharded/  or  model_rank00000.pt ...
        optimizer.00000-of-00008.pt ...                          ema_sharded/    or  ema_rank00000.pt ...
        scheduler.pt  data_status.pt                             optimizer_rank00000.pt ...
                                                                 scheduler.pt  data_status.pt

The fork writes its metadata.json first, so that it promises what may never have come; everything that it promises is
looked for. BAGEL promises nothing but the number of the optimizer's parts.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardsmith.errors import CheckpointError, CheckpointNotFoundError
from shardsmith.formats.detected import BAGEL, BAGEL_SHARDED, INCOMPLETE, DetectedFormat, FormatReader, reason_of
from shardsmith.formats.files import detect_huggingface, has_safetensors, open_safetensors_model, safetensors_models
from shardsmith.formats.models import ModelSource, open_dcp_model
from shardsmith.formats.torch_files.source import open_rank_files
from shardsmith.ground import layout
from shardsmith.manifest.metadata import CHECKPOINT_TYPE, read_json
from shardsmith.tensors.checkpoint_keys import EMA, MAIN

SCHEDULER_FILE = "scheduler.pt"
DATA_STATUS_FILE = "data_status.pt"

_STEMS = {MAIN: "model", EMA: "ema"}
_RANK_FILE = re.compile(r"(?P<what>model|ema|optimizer)_rank(?P<rank>[0-9]{5})\.pt")
_OPTIMIZER_PART = re.compile(r"optimizer\.(?P<part>[0-9]{5})-of-(?P<parts>[0-9]{5})\.pt")


@dataclass(frozen=True, slots=True)
class ForkManifest:
    """The fork's metadata.json."""

    train_steps: int
    world_size: int
    has_ema: bool
    has_scheduler: bool
    has_data_status: bool


def read_fork_manifest(path: Path) -> ForkManifest:
    """Read it. Raises CheckpointError if it is missing, damaged or somebody else's."""
    content = read_json(path / layout.METADATA_FILE)
    if content.get("checkpoint_type") != CHECKPOINT_TYPE:
        raise CheckpointError(path / layout.METADATA_FILE, 'does not say checkpoint_type "sharded"')
    counts = [content.get(name) for name in ("train_steps", "world_size")]
    if any(type(count) is not int or count < 0 for count in counts) or not counts[1]:
        raise CheckpointError(path / layout.METADATA_FILE, "does not say how many steps and ranks there were")
    promises = [content.get(name, False) is True for name in ("has_ema", "has_scheduler", "has_data_status")]
    return ForkManifest(content["train_steps"], content["world_size"], *promises)


def rank_files(what: str, world_size: int) -> list[str]:
    """Names of the fork's files of all ranks; ``what`` is model, ema or optimizer."""
    return [f"{what}_rank{rank:05d}.pt" for rank in range(world_size)]


def optimizer_parts(path: Path) -> list[str]:
    """Names of the parts of the optimizer that BAGEL itself has written, in order."""
    return sorted(name for name in os.listdir(path) if _OPTIMIZER_PART.fullmatch(name))


def detect_fork(path: Path) -> DetectedFormat | None:
    """A step of the fork; incomplete unless all that its manifest promises is there, of one kind and one world size."""
    names = os.listdir(path)
    has_shards = any(_RANK_FILE.fullmatch(name) or name in ("model_sharded", "ema_sharded") for name in names)
    if not has_shards and not _claims_to_be_sharded(path):
        return None
    try:
        manifest = read_fork_manifest(path)
    except CheckpointError as error:
        return DetectedFormat(INCOMPLETE, reason_of(error, path))
    # All problems are named at once: who copies files again wants to know all that are missing.
    problems = [*_missing(path, manifest), *_foreign(names, manifest)]
    problems += [line for model in _promised(manifest) for line in _model_problems(path, model, manifest)]
    if problems:
        return DetectedFormat(INCOMPLETE, "\n  ".join(problems))
    kinds = ", ".join(_kind(path, model) for model in _promised(manifest))
    reason = f"{layout.METADATA_FILE} of step {manifest.train_steps}, {manifest.world_size} ranks; {kinds}"
    return DetectedFormat(BAGEL_SHARDED, reason)


def detect_bagel(path: Path) -> DetectedFormat | None:
    """A step of BAGEL itself; incomplete if the optimizer's parts are not all there, or the weights are not."""
    parts = [match for match in map(_OPTIMIZER_PART.fullmatch, optimizer_parts(path)) if match]
    beside = [name for name in (SCHEDULER_FILE, DATA_STATUS_FILE) if (path / name).is_file()]
    if not parts and not (beside and not (path / "config.json").exists() and safetensors_models(path)):
        return None
    weights = detect_huggingface(path)
    if weights is None or not has_safetensors(path, layout.MAIN_WEIGHTS):
        return DetectedFormat(INCOMPLETE, f"{len(parts)} parts of an optimizer without model.safetensors")
    if weights.name == INCOMPLETE:
        return weights
    counts = sorted({int(match["parts"]) for match in parts})
    if len(counts) > 1:
        return DetectedFormat(INCOMPLETE, f"parts of optimizers of {' and '.join(map(str, counts))} shards are mixed")
    if counts and len(parts) != counts[0]:
        return DetectedFormat(INCOMPLETE, f"{len(parts)} of {counts[0]} parts of the optimizer are there")
    more = [f"an optimizer in {len(parts)} parts", *beside] if parts else beside
    return DetectedFormat(BAGEL, f"{weights.reason}; {', '.join(more)}")


def _claims_to_be_sharded(path: Path) -> bool:
    """Whether there is a manifest that calls itself sharded and is not ours, which has a schema version."""
    try:
        content: dict[str, Any] = read_json(path / layout.METADATA_FILE)
    except CheckpointError:
        return False
    is_dcp = (path / layout.DCP_INDEX_FILE).exists()
    # Ours has no train_steps; a DCP directory of somebody else is no step of the fork, whatever its manifest says.
    return content.get("checkpoint_type") == CHECKPOINT_TYPE and "train_steps" in content and not is_dcp


def _promised(manifest: ForkManifest) -> list[str]:
    return [MAIN, EMA] if manifest.has_ema else [MAIN]


def _missing(path: Path, manifest: ForkManifest) -> list[str]:
    wanted = {SCHEDULER_FILE: manifest.has_scheduler, DATA_STATUS_FILE: manifest.has_data_status}
    lines = [f"{name}: promised and not there" for name, is_wanted in wanted.items() if is_wanted]
    lines = [line for line in lines if not (path / line.split(":")[0]).is_file()]
    optimizers = [name for name in rank_files("optimizer", manifest.world_size) if (path / name).is_file()]
    if optimizers and len(optimizers) != manifest.world_size:
        lines.append(f"optimizer_rank*.pt: {len(optimizers)} of {manifest.world_size} are there")
    return lines


def _foreign(names: list[str], manifest: ForkManifest) -> list[str]:
    """Files of another number of ranks, or of an average that the manifest does not know."""
    found = [match for match in map(_RANK_FILE.fullmatch, sorted(names)) if match]
    lines = [
        f"{match[0]}: {layout.METADATA_FILE} says that there were {manifest.world_size} ranks"
        for match in found
        if int(match["rank"]) >= manifest.world_size
    ]
    if not manifest.has_ema:
        averages = [name for name in sorted(names) if name == "ema_sharded" or name.startswith("ema_rank")]
        lines += [f"{name}: {layout.METADATA_FILE} says that there is no average" for name in averages]
    return lines


def _model_problems(path: Path, model: str, manifest: ForkManifest) -> list[str]:
    stem = _STEMS[model]
    files = [name for name in rank_files(stem, manifest.world_size) if (path / name).exists()]
    has_directory = (path / f"{stem}_sharded").is_dir()
    if has_directory and files:
        return [f"{stem}_sharded and {files[0]} are both there: two saves are mixed"]
    if not has_directory and len(files) != manifest.world_size:
        found = (
            f"{len(files)} of {manifest.world_size} {stem}_rank*.pt" if files else f"neither {stem}_sharded nor files"
        )
        return [f"{model}: {found} of ranks"]
    try:
        _open(path, model).close()
    except CheckpointError as error:
        return [reason_of(error, path)]
    return []


def _kind(path: Path, model: str) -> str:
    stem = _STEMS[model]
    return f"{stem}_sharded" if (path / f"{stem}_sharded").is_dir() else f"{stem}_rank*.pt"


def _models(path: Path) -> list[str]:
    return _promised(read_fork_manifest(path))


def _open(path: Path, model: str) -> ModelSource:
    """A model, which in the fork's layout is the only one in its directory or files."""
    manifest, promised = read_fork_manifest(path), _promised(read_fork_manifest(path))
    if model not in promised:
        raise CheckpointNotFoundError(path, f"has no {model!r} weights; it holds {' and '.join(promised)}")
    stem = _STEMS[model]
    if (path / f"{stem}_sharded").is_dir():
        return open_dcp_model(path / f"{stem}_sharded", MAIN)
    return open_rank_files(path, rank_files(stem, manifest.world_size))


FORK_READER = FormatReader.by_path(detect_fork, _models, _open)
BAGEL_READER = FormatReader.by_path(detect_bagel, safetensors_models, open_safetensors_model)
