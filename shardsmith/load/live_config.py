"""Whether a live model computes with the settings of the model that it is loaded from: eps, theta, heads, and so on."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardsmith.compare.configs import compare_configs
from shardsmith.ground.remote_path import as_path
from shardsmith.hf.blueprint import plain_config, transformers_parts
from shardsmith.hf.config_entries import entries, with_values
from shardsmith.hf.hf_directory import CONFIG_FILE, read_config
from shardsmith.load.faults import LoadFault
from shardsmith.load.live_weights import LiveWeights
from shardsmith.manifest.initial import InitialRecord

LIVE_CONFIG = "the live model's own config"


@dataclass(frozen=True, slots=True)
class LiveConfig:
    """The settings of a live model beside those of what it is loaded from; both empty where one has none."""

    wanted: Mapping[str, Any]
    found: Mapping[str, Any]

    def faults(self, resized: Collection[tuple[int, int]] = ()) -> list[LoadFault]:
        """Return what changes what the model computes.

        Args:
            resized: Sizes of tensors that may differ, in the source and in the model: settings that say just this may
                differ, too, such as that of a vocabulary.
        """
        theirs = {at: value for at, value in entries(self.found) if type(value) is int}
        same = {
            at: theirs[at]
            for at, value in entries(self.wanted)
            if type(value) is int and (value, theirs.get(at)) in resized
        }
        return [
            LoadFault(finding.code, ", ".join(finding.where), f"{finding.found}, expected {finding.expected}")
            for finding in compare_configs(with_values(self.wanted, same), self.found, "the live model")
            if finding.severity == "error"
        ]


def read_live_config(live: LiveWeights, path: Path, record: InitialRecord | None, given: Any = None) -> LiveConfig:
    """Read the settings on both sides.

    Args:
        live: The live model's tensors.
        path: Where the weights were loaded from.
        record: The recorded config of that; None without one.
        given: In the place of the source's config: one of transformers, its dict, or a directory with a config.json.

    Raises:
        CheckpointError: the config cannot be read.
    """
    whole = next((parts[""] for part in live.parts if "" in (parts := transformers_parts(part))), None)
    expected = None if whole is None else source_config(whole, path, record, given)[0]
    if whole is None or expected is None:
        return LiveConfig({}, {})
    wanted = _public(plain_config(expected))
    # Of the same class both print the same fields, so the plain dicts can be compared.
    is_own = isinstance(whole.config, type(expected))
    found = _public(plain_config(whole.config)) if is_own else _like(whole.config, wanted)
    return LiveConfig(wanted, _as_far_as_stated(found, wanted))


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without those that transformers keeps for itself, such as how it chose an attention."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _like(config: Any, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings of a config of another class, a trainer's own, which has more and prints less."""
    found = {name: getattr(config, name) for name in wanted if hasattr(config, name) and name != "model_type"}
    found = {"model_type": wanted.get("model_type"), **found}  # which such a class need not know
    content: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return content


def _as_far_as_stated(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without those, in configs within it, that the source leaves to the defaults of their classes."""
    stated = {}
    for name, value in found.items():
        inner = wanted.get(name)
        if not name.endswith("_config") or not isinstance(value, Mapping):
            stated[name] = value
        elif isinstance(inner, Mapping):
            stated[name] = {key: value[key] for key in inner if key in value}
        else:
            stated[name] = inner
    return stated


def source_config(module: Any, path: Path, record: InitialRecord | None, given: Any) -> tuple[Any, str]:
    """The config that a live transformers model should have, of the class of its own, and where it is from, in words.

    None where the source has none: then its own is all that there is.
    """
    kind = type(module.config)
    if given is None and record is not None and record.config is not None:
        return kind.from_dict(dict(record.config)), "the checkpoint's recorded config"
    if given is None and not (path / CONFIG_FILE).is_file():
        return None, LIVE_CONFIG
    words = f"{path.name}/{CONFIG_FILE}" if given is None else "the config given"
    found = path if given is None else given
    if isinstance(found, str | Path):
        found = read_config(as_path(found))
    return (kind.from_dict(dict(found)) if isinstance(found, Mapping) else found), words
