"""Weights in the base model's layout: by rules where shapes differ, by a look at values where shapes cannot tell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from shardsmith.errors import MismatchError
from shardsmith.formats.models import ModelSource, TranslatedModel
from shardsmith.hf.layout_rules import LayoutRule, LayoutRules, is_patch_rule, order_of_patches
from shardsmith.hf.template import BaseTemplate
from shardsmith.name_maps.slices import Slice
from shardsmith.tensors.tensors import read_tensor


def in_base_layout(source: ModelSource | TranslatedModel, layouts: LayoutRules) -> ModelSource | TranslatedModel:
    """Return the model in the base model's layout: the same where no rule is needed."""
    targets = layouts.targets(source.specs)
    # Nothing to do for any tensor: then the source stays what it is, with its fast ways to read whole boxes.
    if all(targets[name] == Slice.whole(spec) for name, spec in source.specs.items()):
        return source
    return TranslatedModel(source, layouts)


def patch_embeddings(names: Iterable[str], rules: Iterable[LayoutRule]) -> list[str]:
    """Return those of some tensors that are patch embeddings, by the rules."""
    patterns = [rule.pattern for rule in rules if is_patch_rule(rule)]
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def orders_of_patches(
    sources: Mapping[str, ModelSource | TranslatedModel],
    template: BaseTemplate,
    rules: Iterable[LayoutRule],
    allow: Sequence[str],
) -> dict[str, str]:
    """Return where the inputs of patch embeddings stand, by value: shapes cannot tell.

    Raises:
        MismatchError: their order is not that of the base model.
    """
    found: dict[str, str] = {}
    problems = []
    for name in patch_embeddings(template.specs, rules):
        base = template.values(name)
        # Each model by itself: an average may come from another place than main.
        for model, source in sources.items():
            if base is None or name not in source.specs:
                continue
            found[name] = order = order_of_patches(read_tensor(source, name), base)
            if order == "channels first" and not any(fnmatchcase(name, pattern) for pattern in allow):
                problems.append(f"{name} ({model}): nearer to the base model's weights with its channels first")
    if problems:
        summary = "has patch embeddings of the right shape whose values are in another order than in the base model"
        advice = "Nothing was written. The convolution was reshaped without being permuted, or --allow it by name."
        raise MismatchError(template.path, summary, problems, advice)
    return found
