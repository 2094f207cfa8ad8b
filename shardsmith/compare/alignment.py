"""A checkpoint's tensors beside those of a model's files: under their names, and in their layout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from shardsmith.formats.matched import matched_source, renamed
from shardsmith.formats.models import ModelSource
from shardsmith.hf.base_layout import in_base_layout
from shardsmith.hf.hf_directory import read_config
from shardsmith.hf.known_class import model_class_of
from shardsmith.hf.layout_rules import DECLARED, LayoutRule, LayoutRules
from shardsmith.hf.ties import own_places
from shardsmith.name_maps.class_names import ClassNames
from shardsmith.name_maps.matching import Alignment, match_names
from shardsmith.tensors.tensors import TensorSpec


def aligned_source(
    source: ModelSource,
    template: Mapping[str, TensorSpec],
    base: Path | None,
    names: str = "auto",
    rules: Iterable[LayoutRule] = DECLARED,
) -> tuple[ModelSource, Alignment]:
    """Return a model's tensors under the template's names, and in its layout where a rule leads there.

    Args:
        source: The model's tensors under their own names.
        template: The tensors of the model to align with.
        base: Directory of the model that the template is from, whose config says how its names are made.
        names: As ``matched_source`` has it.
        rules: What may be done to tensors of another shape; the first that fits is used.

    Raises:
        CheckpointError, UsageError: a map that was asked for cannot be used.
    """
    classes = ClassNames.of_directory(base) if base is not None else None
    config = read_config(base) if base is not None else None
    # First the names, since a layout rule is looked up by the name of the model that is compared with.
    named, found = matched_source(source, template, classes, names, config)
    if config is not None and (named.aliases or named.specs.keys() - template.keys()):
        model_class, _ = model_class_of(config)  # what it computes itself is in a state dict, and in no files
        unsaved = model_class.unsaved if model_class is not None else ()
        named = named.without(name for name in unsaved if name in named.specs and name not in template)
        apart = own_places(named.aliases, model_class, template)
        named = named.untied({alias: kept for alias, kept in apart.items() if alias in template})
    layouts = LayoutRules(template, rules)
    laid_out = in_base_layout(named, layouts)
    # No rule was needed: the source is the same object.
    if isinstance(laid_out, ModelSource):
        return laid_out, found
    used = {name: rule.name for name, rule in layouts.used.items()}
    # Its tensors have their final names: they are matched with themselves, which only wraps the source.
    plain = renamed(laid_out, match_names(laid_out.specs, laid_out.specs, None, laid_out.aliases))
    return plain, replace(found, layouts=used)
