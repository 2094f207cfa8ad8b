"""Configs as transformers understands them. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardsmith.errors import UnsupportedFormatError
from shardsmith.ground.extras import describe_failure
from shardsmith.ground.local_copy import on_this_machine


def config_of(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """Return a directory's config as transformers understands it, defaults filled in.

    Raises:
        UnsupportedFormatError: there is no transformers, or it does not know the model.
    """
    try:
        from transformers import AutoConfig

        with on_this_machine(directory) as place:
            return AutoConfig.from_pretrained(str(place), trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # whatever a config that it does not know makes it raise
        raise _unknown(directory, error) from error


def unknown_kind(config: Mapping[str, Any]) -> str | None:
    """Return the kind of a model that transformers has no class for, and that brings no code of its own; else None.

    Without transformers nothing is known of any kind: None.
    """
    # A config with an auto_map brings its own class, which trust_remote_code lets transformers use.
    kind = config.get("model_type")
    if not isinstance(kind, str) or config.get("auto_map"):
        return None
    try:
        # This module alone: it lists the kinds and imports no model.
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    except ImportError:
        return None
    return None if kind in CONFIG_MAPPING else kind


def _unknown(directory: Path, error: Exception) -> UnsupportedFormatError:
    reason = describe_failure(error).splitlines()[0]
    return UnsupportedFormatError(directory, f"transformers cannot read this config ({reason})")
