"""Ties of weights that the class of a model declares."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from shardsmith.hf.hf_directory import read_config
from shardsmith.hf.known_class import model_class_of
from shardsmith.hf.ties import tied_groups
from shardsmith.name_maps.class_names import ClassNames
from shardsmith.tensors.tensors import TensorSpec


def class_ties(base: Path, listed: Mapping[str, TensorSpec], specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Return what the class of a directory's config ties, of names that its files do not list: alias -> kept name."""
    found = aliases_of(tied_in_class(base) or {}, listed, specs)
    return {name: kept for name, kept in found.items() if name not in listed}


def aliases_of(
    tied: Mapping[str, str], listed: Mapping[str, TensorSpec], specs: Mapping[str, TensorSpec]
) -> dict[str, str]:
    """Return, of the names that are one tensor, alias -> the one that is kept: one that is listed, if any is."""
    found: dict[str, str] = {}
    for group in tied_groups(tied, {**specs, **listed}):
        kept = next((name for name in group if name in listed), group[0])
        found |= {name: kept for name in group if name != kept}
    return found


def tied_in_class(base: Path) -> Mapping[str, str] | None:
    """By names in memory and in files; None where no class is known.

    Classes are remembered by the content of the config: another base may lie at the same path later.
    """
    model_class, _ = model_class_of(read_config(base))
    if model_class is not None:
        return model_class.tied
    names = ClassNames.of_directory(base)
    return names.tied if names.is_known else None
