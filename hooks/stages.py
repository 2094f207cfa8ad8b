"""A model that is cut into the stages of a pipeline: what all ranks together have of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from shardsmith.errors import RanksDisagreeError
from shardsmith.ground.ranks import Ranks
from shardsmith.load.live_weights import model_state_dict
from shardsmith.tensors.dtypes import dtype_name
from shardsmith.tensors.fqn import tied_weights
from shardsmith.tensors.tensors import TensorSpec

from .ema import EMA


@dataclass(frozen=True, slots=True)
class Stages:
    """The tensors of all stages. What a rank holds of them it says itself, box by box, as with any other sharding."""

    specs: dict[str, TensorSpec]
    """By FQN, with global shapes; of tied ones the kept name only."""
    aliases: dict[str, str]
    averaged: frozenset[str]
    """Those of which there is an average."""

    @classmethod
    def of(cls, ranks: Ranks, model: nn.Module, ema: EMA | None) -> Self:
        """Put together what the ranks have. All ranks; communicates.

        Raises:
            RankFailedError: on all ranks, if tensors of one name are not alike on all that have them.
        """
        found = ranks.agree(
            "putting the stages of the model together", lambda: _describe(model, ema), _unite, large=True
        )
        return cls(
            specs={
                n: TensorSpec(n, tuple(shape), getattr(torch, dtype)) for n, (shape, dtype) in found["specs"].items()
            },
            aliases=found["aliases"],
            averaged=frozenset(found["averaged"]),
        )

    def whole(self, *, is_average: bool) -> tuple[dict[str, TensorSpec], frozenset[str], dict[str, str]]:
        """The tensors of the weights or of the average, which of the latter are those of the weights, and the ties."""
        filled = frozenset(self.specs.keys() - self.averaged) if is_average else frozenset()
        return dict(self.specs), filled, dict(self.aliases)


def are_stages(ranks: Ranks, model: nn.Module) -> bool:
    """Return whether the ranks hold different tensors, as stages do. All ranks; communicates."""
    differ: bool = ranks.agree(
        "looking for stages of a pipeline",
        lambda: sorted(model_state_dict(model)),
        lambda parts: any(part != parts[0] for part in parts),
    )
    return differ


def names_on_all(ranks: Ranks, names: Iterable[str]) -> list[str]:
    """Return what any rank names. All ranks; communicates."""
    united: list[str] = ranks.agree(
        "putting names together",
        lambda: list(names),
        lambda parts: list(dict.fromkeys(name for part in parts for name in part)),
        large=True,
    )
    return united


def _describe(model: nn.Module, ema: EMA | None) -> dict[str, Any]:
    """What this rank has. As JSON."""
    aliases = tied_weights(model)
    tensors = {name: value for name, value in model_state_dict(model).items() if isinstance(value, Tensor)}
    return {
        "specs": {n: [list(t.shape), dtype_name(t.dtype)] for n, t in tensors.items() if n not in aliases},
        "aliases": aliases,
        "averaged": sorted(ema.model_state_dict()) if ema is not None else [],
    }


def _unite(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """On rank 0. As JSON, in the order of the stages."""
    united: dict[str, Any] = {"specs": {}, "aliases": {}, "averaged": []}
    different = set()
    for part in parts:
        different |= {name for name, spec in part["specs"].items() if united["specs"].setdefault(name, spec) != spec}
        united["aliases"] |= part["aliases"]
        united["averaged"] += part["averaged"]
    if different:
        names = ", ".join(sorted(different)[:5])
        raise RanksDisagreeError(
            f"ranks have {len(different)} tensors of one name with other shapes or dtypes: {names}"
        )
    return united
