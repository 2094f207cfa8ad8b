"""A model that is cut into the stages of a pipeline: what all ranks together have of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import xxhash
from torch import nn

from shardsmith.errors import RanksDisagreeError
from shardsmith.ground.distinct import agree_on_distinct
from shardsmith.ground.ranks import Ranks
from shardsmith.load.live_weights import model_state_dict
from shardsmith.tensors.dtypes import dtype_name
from shardsmith.tensors.tensors import TensorSpec


@dataclass(frozen=True, slots=True)
class Stages:
    """The tensors of all stages. What a rank holds of them it says itself, box by box, as with any other sharding."""

    specs: dict[str, TensorSpec]
    """By FQN, or the name that a view gives it, with global shapes; of tied ones the kept name only."""
    aliases: dict[str, str]
    averaged: frozenset[str]
    """Those of which there is an average."""

    @classmethod
    def of(cls, ranks: Ranks, own: Callable[[], Self]) -> Self:
        """Put together what the ranks have. All ranks; communicates.

        Args:
            ranks: The ranks.
            own: Return what this rank has.

        Raises:
            RankFailedError: on all ranks, if tensors of one name are not alike on all that have them.
        """
        found = agree_on_distinct(ranks, "putting the stages of the model together", lambda: own()._plain(), _unite)
        return cls(
            specs={
                n: TensorSpec(n, tuple(shape), getattr(torch, dtype)) for n, (shape, dtype) in found["specs"].items()
            },
            aliases=found["aliases"],
            averaged=frozenset(found["averaged"]),
        )

    def _plain(self) -> dict[str, Any]:
        """As JSON."""
        specs = {name: [list(spec.shape), dtype_name(spec.dtype)] for name, spec in self.specs.items()}
        return {"specs": specs, "aliases": self.aliases, "averaged": sorted(self.averaged)}

    def whole(self, *, is_average: bool) -> tuple[dict[str, TensorSpec], frozenset[str], dict[str, str]]:
        """The tensors of the weights or of the average, which of the latter are those of the weights, and the ties."""
        filled = frozenset(self.specs.keys() - self.averaged) if is_average else frozenset()
        return dict(self.specs), filled, dict(self.aliases)


def are_stages(ranks: Ranks, model: nn.Module) -> bool:
    """Return whether the ranks hold different tensors, as stages do. All ranks; communicates."""
    differ: bool = ranks.agree(
        "looking for stages of a pipeline",
        # A digest, since the names themselves grow with the model, and each rank would send them.
        lambda: xxhash.xxh3_128_hexdigest("\n".join(sorted(model_state_dict(model))).encode()),
        # Under any other sharding all ranks have all names.
        lambda parts: any(part != parts[0] for part in parts),
    )
    return differ


def names_on_all(ranks: Ranks, names: Iterable[str]) -> list[str]:
    """Return what any rank names. All ranks; communicates."""
    return agree_on_distinct(
        ranks,
        "putting names together",
        lambda: list(names),
        lambda parts: list(dict.fromkeys(name for part in parts for name in part)),
    )


def _unite(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """On rank 0. As JSON, in the order of the stages."""
    united: dict[str, Any] = {"specs": {}, "aliases": {}, "averaged": []}
    different = set()
    for part in parts:
        # Several ranks may have the same tensor; then they must say the same of it.
        different |= {name for name, spec in part["specs"].items() if united["specs"].setdefault(name, spec) != spec}
        united["aliases"] |= part["aliases"]
        united["averaged"] += part["averaged"]
    if different:
        names = ", ".join(sorted(different)[:5])
        raise RanksDisagreeError(
            f"ranks have {len(different)} tensors of one name with other shapes or dtypes: {names}"
        )
    return united
