"""The entries of a config.json at every depth: find them, name them, change them in a copy."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from typing import Any

Config = Mapping[str, Any]
Path = tuple[str, ...]
"""The keys that lead to an entry."""

QUANTIZATION = "quantization_config"
OF_THE_HEAD = ("num_labels", "id2label", "label2id")
"""What says how many labels a head has, and what they are called."""


def entries(config: Config, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every entry at any depth; what is said of a quantisation and of labels counts as one entry."""
    for key, value in config.items():
        here = (*path, key)
        yield here, value
        # These stand and fall as a whole: a single entry of them means nothing.
        if isinstance(value, Mapping) and key not in (QUANTIZATION, *OF_THE_HEAD):
            yield from entries(value, here)


def with_values(config: Config, values: Mapping[Path, Any]) -> dict[str, Any]:
    """Return a copy in which these entries have these values."""
    # Deep: the parts of the original must not change with the copy.
    changed = copy.deepcopy(dict(config))
    for path, value in values.items():
        part_at(changed, path[:-1])[path[-1]] = value
    return changed


def part_at(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the part of a config at a path; an empty one is made where there is none."""
    for key in path:
        config = config.setdefault(key, {})
    return config


def undated(config: Any) -> Any:
    """Without dtypes, which change nothing about names and shapes."""
    if not isinstance(config, Mapping):
        return config
    return {key: undated(value) for key, value in config.items() if key not in ("dtype", "torch_dtype")}


def dotted(paths: Collection[Path]) -> str:
    """Return the names of entries, for people."""
    return ", ".join(".".join(path) for path in paths)
