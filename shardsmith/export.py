"""Make a Hugging Face directory from a checkpoint of any format: plan, write, commit.

No model is built and no process group needed. Threads go through the output front to back; each reads one block from
the mapped source, casts it into its own buffer and writes that to its final place, so memory stays at some blocks.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from shardsmith import layout
from shardsmith.block_copy import copy_blocks
from shardsmith.checkpoints import find_damage
from shardsmith.commit import Attempt, sweep, write_file
from shardsmith.digest import Digest
from shardsmith.errors import CorruptCheckpointError
from shardsmith.export_plan import DirectoryPlan, ModelPlan
from shardsmith.formats import SHARDED, detect_checkpoint_format
from shardsmith.hf_directory import CONFIG_FILE, config_for, copy_files
from shardsmith.metadata import dtype_name, now, read_metadata
from shardsmith.safetensors_writer import SafetensorsFileWriter


def write_directories(plans: Sequence[DirectoryPlan], progress: Callable[[int], None] | None = None) -> list[Path]:
    """Write planned directories of one checkpoint and make them visible when all of them are on disk; their paths.

    Args:
        progress: Called from several threads with the number of bytes of weights just written.

    Raises:
        CorruptCheckpointError: the checkpoint's bytes are not those that were saved.
        WriteError: writing failed. No output exists, and nothing else was touched.
    """
    for parent in {plan.output.parent for plan in plans}:
        sweep(parent)
    with contextlib.ExitStack() as attempts, ThreadPoolExecutor(1, "shardsmith-verify") as pool:
        checkpoints = {plan.checkpoint for plan in plans if plan.options.verify}
        verified = [pool.submit(verify_source, checkpoint) for checkpoint in checkpoints]
        written = []
        for plan in plans:
            attempt = attempts.enter_context(Attempt(plan.output))
            written.append((attempt, _write_directory(plan, attempt.directory, progress)))
        for verification in verified:
            verification.result()
        return [attempt.commit(sizes) for attempt, sizes in written]


def verify_source(checkpoint: Path) -> None:
    """Raise CorruptCheckpointError if a file of a checkpoint with recorded hashes has changed. Others pass."""
    if detect_checkpoint_format(checkpoint).name == SHARDED and (damage := find_damage(checkpoint)):
        lines = "\n  ".join(damage)
        advice = "Nothing was written. Copy these files again, or take another step."
        raise CorruptCheckpointError(checkpoint, f"is damaged\n  {lines}\n{advice}")


def _write_directory(plan: DirectoryPlan, directory: Path, progress: Callable[[int], None] | None) -> dict[str, int]:
    """Write and fsync everything that belongs into a directory; the size of each file."""
    sizes: dict[str, int] = {}
    digests: dict[str, dict[str, Digest]] = {}
    for model in plan.models:
        digests[model.model] = _write_model(model, directory, sizes, progress)
    sizes |= _write_config(plan, directory)
    sizes |= copy_files(plan.base, [name for name in plan.copies if name not in sizes], directory)
    provenance = json.dumps(_provenance(plan, digests), indent=1).encode() + b"\n"
    sizes[layout.PROVENANCE_FILE] = write_file(directory / layout.PROVENANCE_FILE, provenance)
    return sizes


def _write_model(
    plan: ModelPlan, directory: Path, sizes: dict[str, int], progress: Callable[[int], None] | None
) -> dict[str, Digest]:
    """Write and fsync the weight files of one model and their index, adding their sizes; the digests by name."""
    writers = []
    try:
        for file in plan.weights.files:
            writers.append(SafetensorsFileWriter.create(directory, file))
            sizes[file.name] = file.size
        digests = copy_blocks(plan.source, writers, progress)
        for writer in writers:
            writer.sync()
    finally:
        for writer in writers:
            writer.close()
    if plan.weights.index is not None:
        name = layout.index_file_name(plan.weights.files[0].name.split("-", 1)[0])
        sizes[name] = write_file(directory / name, json.dumps(plan.weights.index, indent=2).encode() + b"\n")
    return digests


def _write_config(plan: DirectoryPlan, directory: Path) -> dict[str, int]:
    return {CONFIG_FILE: write_file(directory / CONFIG_FILE, config_for(plan.config, _main_dtype(plan)))}


def _main_dtype(plan: DirectoryPlan) -> torch.dtype:
    """The dtype of most floating-point elements."""
    counts: dict[torch.dtype, int] = {}
    for spec in plan.models[0].specs:
        if spec.dtype.is_floating_point:
            counts[spec.dtype] = counts.get(spec.dtype, 0) + spec.numel
    return max(counts, key=lambda dtype: counts[dtype], default=torch.get_default_dtype())


def _provenance(plan: DirectoryPlan, digests: Mapping[str, Mapping[str, Digest]]) -> dict[str, Any]:
    sharded = detect_checkpoint_format(plan.checkpoint).name == SHARDED
    metadata = read_metadata(plan.checkpoint) if sharded else None
    return {
        "schema_version": 1,
        "created_at": now(),
        "source": plan.checkpoint.resolve().name,
        "source_attempt": metadata.attempt if metadata else None,
        "step": metadata.step if metadata else None,
        "ema": metadata.ema if metadata else None,
        "base_model": plan.base.resolve().name,
        "models": {
            model.model: {
                "files": [file.name for file in model.weights.files],
                "tied": dict(model.aliases),
                "not_averaged": sorted(model.source.filled),
                "tensors": {
                    spec.name: {
                        "shape": list(spec.shape),
                        "dtype": dtype_name(spec.dtype),
                        "digest": str(digests[model.model][spec.name]),
                    }
                    for spec in model.specs
                },
            }
            for model in plan.models
        },
    }
