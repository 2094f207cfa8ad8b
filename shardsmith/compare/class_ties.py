"""Names that are one tensor: as the class of a model ties them, or by their values where no class is known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from shardsmith.compare.values import compare_tensor, same_as, scan_source
from shardsmith.formats.models import ModelSource
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


def repeated_names(source: ModelSource, other: ModelSource, base: Path | None, *, rounding: bool) -> Iterator[str]:
    """Yield names that only one side has, and whose values are those of another name, which both have.

    Of a model whose class is known only what that class ties: a copy of a layer is one more layer, and no tie.
    """
    unlisted = [name for name in source.specs if name not in other.specs]
    if not unlisted:
        return
    if base is not None and tied_in_class(base) is not None:
        for name, twin in class_ties(base, other.specs, source.specs).items():
            if name in source.specs and twin in source.specs and _repeats(source, name, twin, rounding=rounding):
                yield name
        return
    # Without a class any tensor of that shape that both sides have may be the one it repeats.
    # Two tensors of zeros are equal without being tied, so this is asked before any pair is compared.
    constant = scan_source(source, unlisted)
    for name in unlisted:
        spec = source.specs[name]
        alike = [twin for twin, kept in source.specs.items() if _alike(kept, spec) and twin in other.specs]
        if not constant[name].constant and any(list(same_as(source, source, {name: twin})) for twin in alike):
            yield name


def _repeats(source: ModelSource, name: str, twin: str, *, rounding: bool) -> bool:
    if source.specs[name].shape != source.specs[twin].shape:
        return False
    found = compare_tensor(source, source, name, twin)
    return found.rounded_alike if rounding else found.same_values


def _alike(one: TensorSpec, other: TensorSpec) -> bool:
    return (one.shape, one.dtype) == (other.shape, other.dtype)
