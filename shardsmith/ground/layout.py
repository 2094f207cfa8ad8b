"""Every name that Shardsmith gives to something on disk, and how such names are read back.

    run/checkpoints/step-500/                    complete: only a rename makes this name
    run/checkpoints/.step-500.tmp-<attempt>/     being written, or left by an attempt that died
    run/checkpoints/.step-500.trash-<attempt>/   being deleted
    run/checkpoints/.removed.trash-<attempt>/    the same, among a trainer's own directories
    run/checkpoints/.step-500.damaged-<attempt>/ found damaged at a resume and set aside
    run/checkpoints/.step-500.superseded-<attempt>/ set aside by a run that went back to an earlier step
    run/checkpoints/latest                       a link to the newest step, where that is wanted
    run/hf/.step-500.push                        an export that is to be on the Hub and is not yet
    run/checkpoints/metrics.jsonl                metrics of steps, by which the best are kept
    run/checkpoints/.retention.json              which steps the run keeps

Names are matched whole, never searched for: ``old-step-500.bak`` is not step 500.
"""

from __future__ import annotations

import re
import secrets
from pathlib import Path

METADATA_FILE = "metadata.json"
"""Our manifest of a sharded checkpoint directory."""
MODEL_CONFIG_FILE = "model_config.json"
"""Beside it: what the live model's config said, where the model has one."""
MOST_MANIFEST_BYTES = 512 << 20
"""Of a manifest, which lists all tensors with their digests: a larger file is none."""
PROVENANCE_FILE = "shardsmith.json"
"""Where an exported Hugging Face directory came from."""
COMPANION = "shardsmith"
"""Our directory in a checkpoint folder that a trainer wrote. That it is there says that both parts are complete."""
FOLDER_FILE = "folder.json"
"""In it: what the trainer's folder holds."""
DCP_INDEX_FILE = ".metadata"
"""torch.distributed.checkpoint's own index (a pickle)."""
BOX_INDEX_FILE = ".boxes"
"""What that index says, in a form of which each rank reads only what it loads."""
EMA_PREFIX = "ema_model."
"""FQN prefix of the averaged weights in a DCP directory. Not ``ema.``: TorchTitan keeps its own there."""
REST_FOLDER = "float32-rest"
"""In a directory of bfloat16 weights: what is missing to the float32 ones that train, under the same names."""

CACHE_OF_FILE = "cache-of.txt"
"""In a run's folder on a host's own disk: the place in an object store that its steps go to."""
ALONE_SINCE_FILE = "alone-since.txt"
"""Beside it: the step that a run went on from while that place could not be asked which steps it has."""
LATEST_LINK = "latest"
"""In a run directory: a link to the newest step, if that is wanted."""
METRICS_FILE = "metrics.jsonl"
"""Beside the step directories: what ``Hooks.metric`` was told, a line each."""
RETENTION_FILE = ".retention.json"
"""Beside the step directories: the policy of the run."""
REMOVED = "removed"
"""Stands for the name of a directory in that of its trash, where the name must not be seen."""

MAIN_WEIGHTS = "model"
COMPONENT_WEIGHTS = "diffusion_pytorch_model"
EMA_WEIGHTS = "ema"
"""Stems of the weight files in a Hugging Face directory."""

# No leading zeros, so each step has one name; 18 digits fit into 64 bits.
_STEP = re.compile(r"step-(0|[1-9][0-9]{0,17})")
_PUSH = re.compile(r"\.step-(0|[1-9][0-9]{0,17})(?:-ema)?\.push")
_PLACED = (LATEST_LINK, RETENTION_FILE, CACHE_OF_FILE, ALONE_SINCE_FILE, METADATA_FILE)
_TEMPORARY = re.compile(r"\.(?P<target>.+)\.(?P<kind>tmp|trash)-(?P<attempt>[0-9a-f]{16})")


def new_attempt_id() -> str:
    """Return a fresh random attempt id: 16 lower-case hexadecimal digits."""
    return secrets.token_hex(8)


def step_name(step: int) -> str:
    """Name of the directory of one step. Inverse of ``parse_step``."""
    return f"step-{step}"


def parse_step(name: str) -> int | None:
    """Return the step that a directory name stands for, or None if it is no step of ours."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def temporary_path(target: Path, attempt: str) -> Path:
    """Return where an attempt writes before its rename to ``target``: beside it, on the same file system."""
    return target.with_name(f".{target.name}.tmp-{attempt}")


def trash_path(target: Path, attempt: str) -> Path:
    """Return where ``target`` is moved to before it is deleted."""
    return target.with_name(f".{target.name}.trash-{attempt}")


def damaged_path(target: Path, attempt: str) -> Path:
    """Return where a damaged checkpoint is set aside; nothing of ours reads or deletes it there."""
    return target.with_name(f".{target.name}.damaged-{attempt}")


def superseded_path(target: Path, attempt: str) -> Path:
    """Where a checkpoint is set aside that is newer than the one a run went back to; nothing of ours reads it there."""
    return target.with_name(f".{target.name}.superseded-{attempt}")


def push_mark(export: Path) -> Path:
    """Return the file which says that an export is still to be pushed to the Hub."""
    return export.with_name(f".{export.name}.push")


def pushed_step(mark: str) -> int | None:
    """Return the step whose export is still to be pushed, by the name of such a file; None for any other."""
    match = _PUSH.fullmatch(mark)
    return int(match[1]) if match else None


def is_leftover(name: str) -> bool:
    """Return whether a name is one that only an unfinished attempt or deletion of ours leaves behind."""
    return _TEMPORARY.fullmatch(name) is not None


def unfinished_step(leftover: str) -> int | None:
    """Return the step that an attempt which died was writing, an average apart included; None for anything else."""
    match = _TEMPORARY.fullmatch(leftover)
    step = _STEP.match(match["target"]) if match and match["kind"] == "tmp" else None
    return int(step[1]) if step else None


def is_leftover_file(name: str) -> bool:
    """Return whether a name is that of a link or a file, beside the steps or in one, not put in its place."""
    match = _TEMPORARY.fullmatch(name)
    return match is not None and match["target"] in _PLACED


def shard_file_names(stem: str, count: int) -> list[str]:
    """Hub-style names of ``count`` safetensors files: one is ``model.safetensors``, several are numbered."""
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def index_file_name(stem: str) -> str:
    """Name of the index that goes with several files of one stem."""
    return f"{stem}.safetensors.index.json"
