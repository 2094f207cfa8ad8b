"""The names of a transformers model that lies inside a module of TorchTitan's, as in its backend of that name."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from torch import nn

from shardsmith.errors import UsageError
from shardsmith.formats.dcp.beside_weights import index_of
from shardsmith.hf.blueprint import twin_of
from shardsmith.load.source import read_record
from shardsmith.name_maps.maps import NameMap
from shardsmith.name_maps.slices import Joined, Slice, Target
from shardsmith.name_maps.transformers import TransformersNames
from shardsmith.tensors.checkpoint_keys import MAIN, find_models
from shardsmith.tensors.fqn import clean_fqn, own_class
from shardsmith.tensors.tensors import TensorSpec


def find_held(model: nn.Module) -> tuple[str, Any] | None:
    """Return the model of transformers that a module is nothing but a holder of, and the attribute that holds it."""
    modeling = sys.modules.get("transformers.modeling_utils")
    children = model._modules  # what named_children says 0.3's holder makes up
    if modeling is None or len(children) != 1 or isinstance(model, modeling.PreTrainedModel):
        return None
    ((attribute, inner),) = children.items()
    return (attribute, inner) if isinstance(inner, modeling.PreTrainedModel) else None


def held_alone(parts: Sequence[nn.Module], checkpoint: Path) -> list[nn.Module]:
    """The models of transformers without their holders, if a DCP directory calls the tensors as these do; else none.

    So it does if to-dcp made it with ``--layout nested``, where TorchTitan finds its own names.
    """
    held = [one[1] for part in parts if (one := find_held(part)) is not None]
    index = index_of(checkpoint)
    names = find_models(index.tensors, index.containers).get(MAIN, {}).keys()
    # Then the holder's own names are there, and nothing is taken off.
    as_held = all(name in names for part in parts for name in part.state_dict())
    return held if len(held) == len(parts) and not as_held else []


def refuse_replaced(model: nn.Module) -> None:
    """Raise UsageError if modules of a held model are not those of transformers, so that nobody knows their names.

    0.3 puts mixtures of experts of its own in the place of theirs.
    """
    if (held := find_held(model)) is None:
        return
    known = {clean_fqn(name) for name in twin_of(held[1]).state_dict()}
    # By names: 0.3 puts modules of its own in the place of some of transformers'.
    strange = [name for name in map(clean_fqn, held[1].state_dict()) if name not in known]
    if strange:
        kind = own_class(held[1]).__name__
        raise UsageError(
            f"checkpoint_hooks: TorchTitan has put {len(strange)} tensors into {kind} that transformers does not have "
            f"there, {strange[0]} for one: what is exported would not load. Export nothing of it"
        )


def recorded_config(checkpoint: Path) -> Any:
    """Return the config that to-dcp recorded, in the class that transformers has for it; None without one."""
    record = read_record(checkpoint)
    if record is None or record.config is None:
        return None
    from transformers import AutoConfig

    return AutoConfig.for_model(**record.config)


BACKEND = "transformers_modeling_backend"
"""How TorchTitan calls its own."""


class InnerNames:
    """A ``NameMap``: what a model is called without the attribute that holds it, and then as transformers has it."""

    def __init__(self, attribute: str, names: NameMap | None) -> None:
        """``names`` are those of the inner model; None where its files have the names that it has in memory."""
        self._prefix = f"{attribute}."
        self._names = names

    @classmethod
    def of(cls, model: nn.Module) -> Self | None:
        """For a module that is nothing but a holder of a model of transformers; None for any other."""
        held = find_held(model)
        return None if held is None else cls(held[0], TransformersNames.of_model(held[1]))

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
