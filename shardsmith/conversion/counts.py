"""What a checkpoint to start from holds, counted by kind, and what it should hold by the model's own account."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardsmith.tensors.tensors import TensorSpec

if TYPE_CHECKING:
    from shardsmith.conversion.plan import ConversionPlan


_MEASURE = "get_model_state_dict"
"""The function of torch whose names and shapes, with those of heads, are the measure of a complete checkpoint."""


@dataclass(frozen=True, slots=True)
class Count:
    """How much of something there is in the checkpoint, and how much there should be."""

    what: str
    tensors: int
    elements: int
    expected_tensors: int | None
    """None where nothing knows the model."""
    expected_elements: int | None

    @property
    def is_right(self) -> bool:
        """Whether it is as it should be, as far as anybody knows."""
        if self.expected_tensors is None:
            return True
        return (self.tensors, self.elements) == (self.expected_tensors, self.expected_elements)


def count_tensors(plan: ConversionPlan, written: Mapping[str, TensorSpec]) -> list[Count]:
    """Count what was written.

    Args:
        plan: The plan of the checkpoint.
        written: All tensors of the checkpoint, by key, as its index has them.
    """
    # A nested checkpoint has its keys below "model."; the model and the heads know them without it.
    paths = {key: path[-1] for key, path in plan.containers.items()}
    found = {paths.get(key, key): spec for key, spec in written.items()}
    heads = {key: spec for head in plan.heads for key, spec in head.specs.items()}
    tied, blueprint = plan.model.tied, plan.model.blueprint
    state = (
        blueprint.state_dict if blueprint else {**plan.model.specs, **{a: plan.model.specs[k] for a, k in tied.items()}}
    )
    parameters = {name: spec for name, spec in state.items() if not (blueprint and name in blueprint.buffers)}
    # By kind, so that each tensor is counted once, and what is missing can be named by its kind.
    kinds = {
        "model parameters" if blueprint else "tensors of the files": [n for n in parameters if n not in tied],
        "tied: the same under another name": list(tied),
        "persistent buffers": list(blueprint.buffers) if blueprint else [],
        "heads": list(heads),
    }
    expected = {**state, **heads}
    counts = [_count(what, names, found, expected) for what, names in kinds.items()]
    # What nothing asks for makes the sum differ, also where every kind by itself is complete.
    unexpected = [name for name in found if name not in expected]
    whole = _count(_MEASURE if blueprint else "in all", [*expected, *unexpected], found, expected)
    return [*counts, whole, *([_transient(plan)] if blueprint else [])]


def _count(
    what: str, names: Iterable[str], found: Mapping[str, TensorSpec], expected: Mapping[str, TensorSpec]
) -> Count:
    names = list(names)
    here = [found[name] for name in names if name in found]
    meant = [expected[name] for name in names if name in expected]
    return Count(what, len(here), sum(s.numel for s in here), len(meant), sum(s.numel for s in meant))


def _transient(plan: ConversionPlan) -> Count:
    """Non-persistent buffers are in no state dict; metadata.json has them."""
    recorded = plan.initial.buffers.values()
    meant = plan.model.blueprint.transient.values() if plan.model.blueprint else ()
    return Count(
        "non-persistent buffers, in metadata.json",
        len(recorded),
        sum(math.prod(record.shape) for record in recorded),
        len(meant),
        sum(values.numel() for values in meant),
    )
