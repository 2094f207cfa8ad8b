"""What makes a directory of weights complete: index, config, the base model's other files, and where it came from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from shardsmith.ground import layout
from shardsmith.ground.commit import sync, write_file, writing
from shardsmith.hf.directory import DirectoryPlan, ModelPlan
from shardsmith.hf.export_files import file_records
from shardsmith.hf.hf_directory import CONFIG_FILE, config_for, copy_files
from shardsmith.hf.model_card import CARD_FILE, model_card
from shardsmith.manifest.metadata import now, sealed_json
from shardsmith.tensors.digest import Digest
from shardsmith.tensors.dtypes import CASTABLE, dtype_name

Digests = Mapping[str, Mapping[str, Digest]]
"""By model, then by tensor, of what was written."""


def complete_directory(plan: DirectoryPlan, directory: Path, digests: Digests) -> dict[str, int]:
    """Write and fsync everything beside the weights; the size of every file there must be, weights included.

    Args:
        plan: The plan of the directory.
        directory: Where the weight files are already, each fsynced.
        digests: Digests of the written tensors.

    Raises:
        WriteError: a write failed.
    """
    sizes = {file.name: file.size for model in plan.models for file in model.weights.files}
    for model in plan.models:
        if model.weights.index is not None:
            name = layout.index_file_name(model.stem)
            sizes[name] = write_file(directory / name, _json(model.weights.index))
    if plan.config is not None:
        sizes[CONFIG_FILE] = write_file(directory / CONFIG_FILE, config_for(plan.config, _main_dtype(plan)))
    # Before the base's files: a tokenizer that the trainer has goes before the base model's.
    if plan.companions is not None:
        sizes |= _write_companions(plan, directory)
    if plan.base is not None:
        # Names that are there are skipped: nothing in the directory is written twice.
        sizes |= copy_files(plan.base, [name for name in plan.copies if name not in sizes], directory)
    if CARD_FILE not in sizes:  # the base model's, or one of the caller's, is kept
        sizes[CARD_FILE] = write_file(directory / CARD_FILE, model_card(plan, digests, sizes))
    weights = {file.name for model in plan.models for file in model.weights.files}
    # Last, when every other file is there and durable: the record holds their sizes and hashes.
    with writing(directory, "hashing its files"):
        provenance = _provenance(plan, digests) | {"files": file_records(directory, sizes, weights)}
    sizes[layout.PROVENANCE_FILE] = write_file(directory / layout.PROVENANCE_FILE, sealed_json(provenance))
    return sizes


def _write_companions(plan: DirectoryPlan, directory: Path) -> dict[str, int]:
    assert plan.companions is not None
    with writing(directory, "writing tokenizer, processor and other files"):
        # Whatever has appeared since: nobody says which files ``save_pretrained`` of a tokenizer writes.
        before = _files_in(directory)
        plan.companions(directory)
        new = _files_in(directory) - before
        for path in new:
            sync(path)
    return {str(path.relative_to(directory)): path.stat().st_size for path in new}


def _files_in(directory: Path) -> set[Path]:
    return {path for path in directory.rglob("*") if path.is_file()}


def _main_dtype(plan: DirectoryPlan) -> torch.dtype:
    """The dtype of most floating-point elements that are not quantised: what the model computes in."""
    counts: dict[torch.dtype, int] = {}
    for spec in plan.models[0].specs:
        # Scales and packed numbers of a quantisation are in no dtype that a model computes in.
        if spec.dtype in CASTABLE:
            counts[spec.dtype] = counts.get(spec.dtype, 0) + spec.numel
    return max(counts, key=lambda dtype: counts[dtype], default=torch.get_default_dtype())


def _provenance(plan: DirectoryPlan, digests: Digests) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "created_at": now(),
        "source": plan.origin.source,
        "source_attempt": plan.origin.attempt,
        "step": plan.origin.step,
        "ema": plan.origin.ema,
        "base_model": plan.base.resolve().name if plan.base else None,
        "compared": str(plan.measure),
        "models": {model.model: _model_provenance(model, digests[model.model]) for model in plan.models},
    }


def _model_provenance(model: ModelPlan, digests: Mapping[str, Digest]) -> dict[str, Any]:
    return {
        "files": [file.name for file in model.weights.files],
        "tied": dict(model.aliases),
        "not_averaged": sorted(model.filled),
        "tensors": {
            spec.name: {
                "shape": list(spec.shape),
                "dtype": dtype_name(spec.dtype),
                "digest": str(digests[spec.name]),
            }
            for spec in model.specs
        },
    }


def _json(content: Any) -> bytes:
    return json.dumps(content, indent=1).encode() + b"\n"
