"""Whether a live model computes with the settings of the model that it is loaded from: eps, theta, heads, and so on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardsmith.blueprint import plain_config, transformers_parts
from shardsmith.diagnose.configs import compare_configs, effective_config
from shardsmith.hf_directory import CONFIG_FILE
from shardsmith.initial_record import InitialRecord
from shardsmith.live_weights import LiveWeights
from shardsmith.load_faults import LoadFault


def compare_live_config(
    live: LiveWeights, path: Path, record: InitialRecord | None, given: Any = None
) -> list[LoadFault]:
    """Settings that change what the model computes. Empty where the source has no config, or the model none.

    Args:
        given: In the place of the source's config: one of transformers, its dict, or a directory with a config.json.

    Raises:
        CheckpointError: the config cannot be read.
    """
    whole = next((parts[""] for part in live.parts if "" in (parts := transformers_parts(part))), None)
    expected = _expected(path, record, given)
    if whole is None or expected is None:
        return []
    findings = compare_configs(expected, plain_config(whole.config), "the live model")
    return [
        LoadFault(finding.code, ", ".join(finding.where), f"{finding.found}, expected {finding.expected}")
        for finding in findings
        if finding.severity == "error"
    ]


def _expected(path: Path, record: InitialRecord | None, given: Any) -> Mapping[str, Any] | None:
    if given is not None:
        if isinstance(given, str | Path):
            return effective_config(Path(given))
        return given if isinstance(given, Mapping) else plain_config(given)
    if record is not None and record.config is not None:
        return record.config
    return effective_config(path) if (path / CONFIG_FILE).is_file() else None
