"""What one rank puts into a checkpoint, before it is flattened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shardsmith.ground import layout
from shardsmith.run_state.weight_files import WeightFiles

RNG = "rng"
"""Key of what each rank saves for itself alone; everything else that two ranks both hold must agree."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """What one rank puts into a checkpoint."""

    step: int
    """Optimizer steps done."""
    state_dict: dict[str, Any]
    """Flat FQNs of the model, or ``{"model": ...}``; beside them ``optimizer``, ``ema_model`` and so on, nested."""
    ema: dict[str, Any] | None = None
    """Facts of the average, for people and for resuming."""
    tied: dict[str, str] = field(default_factory=dict)
    """Alias FQN -> kept FQN."""
    mesh: dict[str, Any] | None = None
    """Shape and dimension names of the parameters' device mesh."""
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Of the optimizers' groups, by the FQN of the first parameter: compared between the ranks that have the group."""
    weights: WeightFiles = field(default_factory=lambda: WeightFiles((), {}))
    """Where weights go that are not for DCP files."""
    names: dict[str, Any] | None = None
    """How the weights are called in Hugging Face files, as ``metadata.json`` has it. That of rank 0 counts."""
    settings: bytes | None = None
    """Content of ``model_config.json``; None for a model without a config. That of rank 0 counts."""

    @property
    def files(self) -> dict[str, bytes]:
        """What lies beside the tensors, by name: rank 0 writes it."""
        return {} if self.settings is None else {layout.MODEL_CONFIG_FILE: self.settings}


def facts_of(contents: Contents) -> dict[str, Any]:
    """What must be the same on all ranks, to be told to rank 0."""
    return {"step": contents.step, "ema": contents.ema, "mesh": contents.mesh}


def different_facts(facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each fact that not all ranks have alike."""
    return [
        f"{name}: " + ", ".join(f"rank {rank} {other[name]}" for rank, other in enumerate(facts))
        for name in facts[0]
        if any(other[name] != facts[0][name] for other in facts)
    ]
