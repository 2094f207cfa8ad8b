"""What an export takes from TorchTitan's ``hf_assets_path``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from shardsmith.errors import CheckpointNotFoundError, UsageError
from shardsmith.ground.remote_path import as_path

from .options import CheckpointHooks

log = logging.getLogger(__name__)

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def find_base_model(options: CheckpointHooks, sd_adapter: Any) -> Path:
    """Return the directory with config.json, tokenizer and generation config.

    Raises:
        UsageError: nobody names one.
        CheckpointNotFoundError: config.json or a tokenizer is not in it; says how they get there.
    """
    named = options.export_base_model or getattr(sd_adapter, "hf_assets_path", None)
    if not named:
        raise UsageError(
            "checkpoint_hooks: an export needs config.json and a tokenizer, but this model has no hf_assets_path: "
            "give export_base_model"
        )
    path = as_path(named)
    missing = [] if (path / "config.json").is_file() else ["config.json"]
    if not any((path / name).is_file() for name in _TOKENIZERS):
        missing.append(f"a tokenizer ({', '.join(_TOKENIZERS)})")
    if missing:
        raise CheckpointNotFoundError(
            path,
            f"an export cannot be complete: {' and '.join(missing)} not there. TorchTitan's "
            "scripts/download_hf_assets.py fetches them with --assets config tokenizer; or name a directory that has "
            "them in export_base_model",
        )
    if not (path / "generation_config.json").is_file():
        log.warning("%s has no generation_config.json; the exports will have none", path)
    return path
