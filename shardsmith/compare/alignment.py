"""Which tensor of a checkpoint is which of a model's files, although wrappers and prefixes have changed the names."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from shardsmith.errors import CheckpointError, UsageError
from shardsmith.export.base_layout import in_base_layout
from shardsmith.export.hf_directory import read_config
from shardsmith.export.layout_rules import DECLARED, LayoutRule, LayoutRules
from shardsmith.models import ModelSource, TranslatedModel
from shardsmith.name_maps.maps import find_name_map
from shardsmith.tensors import TensorSpec

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
    layouts: Mapping[str, str] = field(default_factory=dict)
    """The template's name -> the layout rule by which the checkpoint's tensor gets the template's shape."""

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
    source: ModelSource,
    template: Mapping[str, TensorSpec],
    base: Path | None,
    names: str = "auto",
    rules: Iterable[LayoutRule] = DECLARED,
) -> tuple[ModelSource, Alignment]:
    """A model's tensors under the template's names, and in its layout where a rule leads there.

    Args:
        base: Directory of the model that the template is from, whose config says how its names are made.
        names: ``"identity"``: as they are. ``"transformers"``: as transformers has them in files, experts one by one.
            ``"auto"``: so where that brings more of them together. Or a name map that an installed package offers.
        rules: What may be done to tensors of another shape; the first that fits is used.

    Raises:
        CheckpointError, UsageError: a map that was asked for cannot be used.
    """
    named, found = _under_names(source, template, base, names)
    layouts = LayoutRules(template, rules)
    laid_out = in_base_layout(named, layouts)
    if isinstance(laid_out, ModelSource):
        return laid_out, found
    used = {name: rule.name for name, rule in layouts.used.items()}
    plain = renamed(laid_out, align(laid_out.specs, laid_out.specs))
    return plain, replace(found, layouts=used)


def _under_names(
    source: ModelSource, template: Mapping[str, TensorSpec], base: Path | None, names: str
) -> tuple[ModelSource, Alignment]:
    found = align(source.specs, template)
    plain = renamed(source, found)
    if names == "identity" or (names in ("auto", "transformers") and base is None):
        return plain, found
    if names not in ("auto", "transformers"):
        name_map = find_name_map(names, read_config(base) if base is not None else None)
        translated = TranslatedModel(renamed(source, align(source.specs, ())), name_map)
        return renamed(translated, align(translated.specs, template)), found
    assert base is not None
    if names == "transformers":
        return _as_in_files(plain, template, base), found
    return _better(plain, template, base), found


def _better(plain: ModelSource, template: Mapping[str, TensorSpec], base: Path) -> ModelSource:
    """The names that transformers gives in files, if there are tensors on both sides that only they bring together."""
    missing, extra = template.keys() - plain.specs.keys(), plain.specs.keys() - template.keys()
    if not (missing and extra):
        return plain
    try:
        translated = _as_in_files(plain, template, base)
    except (CheckpointError, UsageError):
        return plain
    return translated if len(template.keys() - translated.specs.keys()) < len(missing) else plain


def _as_in_files(plain: ModelSource, template: Mapping[str, TensorSpec], base: Path) -> ModelSource:
    from shardsmith.name_maps.transformers import TransformersNames

    translated = TranslatedModel(plain, TransformersNames.of_directory(base, template))
    return renamed(translated, align(translated.specs, template))


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
