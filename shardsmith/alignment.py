"""Which tensor of a checkpoint is which of a model's files, although wrappers and prefixes have changed the names."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from shardsmith.errors import UnsupportedFormatError
from shardsmith.hf_directory import read_config
from shardsmith.models import ModelSource, TranslatedModel
from shardsmith.name_maps import NameMap, find_name_map
from shardsmith.tensors import TensorSource, TensorSpec

_TRANSIENT = re.compile(r"(^|\.)(inv_freq|original_inv_freq|masked_bias|position_ids|cos_cached|sin_cached|freqs_cis)$")
_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


@dataclass(frozen=True, slots=True)
class Alignment:
    """The names of a checkpoint's tensors, put side by side with those of a template."""

    keys: dict[str, str]
    """The template's name, or for what is extra the name without wrappers -> the checkpoint's own name."""
    wrappers: tuple[str, ...]
    """Segments of wrappers that were left out, such as ``_orig_mod``."""
    removed: str
    """Prefix that the checkpoint's names have more than the template's, such as ``module.``."""
    added: str
    """Prefix that they have less, such as ``model.``."""

    @property
    def is_plain(self) -> bool:
        """Whether the names are as they stand in the checkpoint."""
        return not (self.wrappers or self.removed or self.added)


def align(names: Iterable[str], template: Collection[str]) -> Alignment:
    """Find the names under which most of a checkpoint's tensors are the template's.

    Segments of wrappers go wherever they stand, unless the template has them; then at most one prefix is taken off or
    put before all names. Where that would make two names one, they stay as they are.
    """
    wrappers = _WRAPPERS - {segment for name in template for segment in name.split(".")}
    cleaned = {name: ".".join(part for part in name.split(".") if part not in wrappers) for name in names}
    seen = tuple(sorted({part for name in cleaned for part in name.split(".") if part in wrappers}))
    if len(set(cleaned.values())) < len(cleaned):
        cleaned, seen = {name: name for name in cleaned}, ()
    best = ("", "")
    for candidate in _prefixes(cleaned.values(), template):
        if _matches(cleaned.values(), template, *candidate) > _matches(cleaned.values(), template, *best):
            best = candidate
    changed = {name: _changed(clean, template, *best) for name, clean in cleaned.items()}
    if len(set(changed.values())) < len(changed):
        changed, best = cleaned, ("", "")
    return Alignment({new: old for old, new in changed.items()}, seen, *best)


def aligned_source(
    source: ModelSource, template: Mapping[str, TensorSpec], base: Path | None, names: str = "auto"
) -> tuple[ModelSource, Alignment]:
    """A model's tensors under the template's names.

    Args:
        base: Directory of the model that the template is from, whose config says how its names are made.
        names: ``"auto"``: experts that are fused into one tensor come apart as transformers has them in files, where
            the template has them apart. ``"transformers"``: so in any case. ``"identity"``: never. Or a name map that
            an installed package offers.

    Raises:
        CheckpointError, UsageError: a map that was asked for cannot be used.
    """
    found = align(source.specs, template)
    name_map = _name_map(source, template, found, base, names)
    if name_map is None:
        return renamed(source, found), found
    known = names in ("auto", "transformers")
    translated = TranslatedModel(renamed(source, found if known else align(source.specs, ())), name_map)
    return renamed(translated, align(translated.specs, template)), found


def _name_map(
    source: ModelSource, template: Mapping[str, TensorSpec], found: Alignment, base: Path | None, names: str
) -> NameMap | None:
    """The map that is asked for; None for names as they are."""
    if names not in ("auto", "identity", "transformers"):
        return find_name_map(names, read_config(base) if base is not None else None)
    if names == "identity" or base is None or (names == "auto" and not _fused(source, template, found)):
        return None
    from shardsmith.transformers_names import TransformersNames

    try:
        return TransformersNames.of_directory(base, template)
    except UnsupportedFormatError:
        if names == "transformers":
            raise
        return None


def renamed(source: ModelSource | TranslatedModel, alignment: Alignment) -> ModelSource:
    """A model's tensors under their aligned names."""
    new = {old: name for name, old in alignment.keys.items()}
    cleaned = {alias: _cleaned(alias, alignment) for alias in source.aliases}
    aliases = {cleaned[alias]: new[kept] for alias, kept in source.aliases.items() if kept in new}
    filled = frozenset(new[name] for name in source.filled if name in new)
    return ModelSource(source, alignment.keys, filled=filled, aliases=aliases)


def is_transient(name: str) -> bool:
    """Whether it is called like a buffer that older code made persistent, and that newer code makes from the config."""
    return _TRANSIENT.search(name) is not None


def fused_experts(specs: Iterable[TensorSpec]) -> bool:
    """Whether there are experts that are one tensor."""
    return any(len(spec.shape) > 2 and "experts" in spec.name for spec in specs)


def _fused(source: TensorSource, template: Mapping[str, TensorSpec], found: Alignment) -> bool:
    """Whether one of the two has fused experts that the other does not have."""
    unmatched = [source.specs[old] for new, old in found.keys.items() if new not in template]
    return bool(template) and fused_experts(unmatched)


def _prefixes(names: Iterable[str], template: Collection[str]) -> Iterator[tuple[str, str]]:
    """(removed, added) pairs worth a try, the shorter ones first."""
    for depth in (1, 2):
        yield from sorted({(head, "") for head in _heads(names, depth)})
        yield from sorted({("", head) for head in _heads(template, depth)})


def _heads(names: Iterable[str], depth: int) -> set[str]:
    """The first segments of names that have more, with the dot behind them; no more than a few."""
    heads = {".".join(name.split(".")[:depth]) + "." for name in names if name.count(".") > depth}
    return heads if len(heads) <= 16 else set()


def _matches(names: Iterable[str], template: Collection[str], removed: str, added: str) -> int:
    return sum(_changed(name, template, removed, added) in template for name in names)


def _changed(name: str, template: Collection[str], removed: str, added: str) -> str:
    """A name without one prefix, or with another: where that makes it one of the template's."""
    if removed and name.startswith(removed):
        return name.removeprefix(removed)
    return added + name if added and added + name in template else name


def _cleaned(name: str, alignment: Alignment) -> str:
    clean = ".".join(part for part in name.split(".") if part not in alignment.wrappers)
    return alignment.added + clean.removeprefix(alignment.removed)
