"""What ranks tell each other of the digests of a directory's tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from shardsmith.hf.directory import DirectoryPlan, ModelPlan
from shardsmith.sharding.shares import add_up_shares, pack_shares
from shardsmith.tensors.digest import Digest


def encode(models: Iterable[ModelPlan], digests: Mapping[str, Mapping[str, Digest]]) -> dict[str, str]:
    """As text by model, for JSON. ``add_up`` reads it."""
    return {
        model.model: pack_shares(digests.get(model.model, {}), [spec.name for spec in model.specs]) for model in models
    }


def add_up(plan: DirectoryPlan, encoded: Sequence[Mapping[str, str]]) -> dict[str, dict[str, Digest]]:
    """Return the digests of whole tensors from every rank's shares."""
    return {
        model.model: add_up_shares(
            (found[model.model] for found in encoded if model.model in found), [spec.name for spec in model.specs]
        )
        for model in plan.models
    }
