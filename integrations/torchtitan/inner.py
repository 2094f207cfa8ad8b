"""The names of a transformers model that lies inside a module of TorchTitan's, as in 0.2's backend of that name."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Self

from torch import nn

from shardsmith.name_maps.maps import NameMap
from shardsmith.name_maps.slices import Joined, Slice, Target
from shardsmith.name_maps.transformers import TransformersNames
from shardsmith.tensors import TensorSpec


class InnerNames:
    """A ``NameMap``: what a model is called without the attribute that holds it, and then as transformers has it."""

    def __init__(self, attribute: str, names: NameMap | None) -> None:
        """``names`` are those of the inner model; None where its files have the names that it has in memory."""
        self._prefix = f"{attribute}."
        self._names = names

    @classmethod
    def of(cls, model: nn.Module) -> Self | None:
        """For a module that is nothing but a holder of a model of transformers; None for any other."""
        modeling = sys.modules.get("transformers.modeling_utils")
        children = dict(model.named_children())
        if modeling is None or len(children) != 1 or isinstance(model, modeling.PreTrainedModel):
            return None
        ((attribute, inner),) = children.items()
        if not isinstance(inner, modeling.PreTrainedModel):
            return None
        return cls(attribute, TransformersNames.of_model(inner))

    def targets(self, specs: Mapping[str, TensorSpec]) -> dict[str, Target]:
        """As ``NameMap.targets``."""
        inner = {name.removeprefix(self._prefix): spec for name, spec in specs.items()}
        inner = {name: TensorSpec(name, spec.shape, spec.dtype) for name, spec in inner.items()}
        if self._names is None:
            found: Mapping[str, Target] = {name: Slice.whole(spec) for name, spec in inner.items()}
        else:
            found = self._names.targets(inner)
        return {name: self._in_holder(target) for name, target in found.items()}

    def _in_holder(self, target: Target) -> Target:
        """The same of the tensors as the holder calls them."""
        if isinstance(target, Joined):
            return replace(target, parts=tuple(self._slice(part) for part in target.parts))
        return self._slice(target)

    def _slice(self, part: Slice) -> Slice:
        return replace(part, source=self._prefix + part.source)
