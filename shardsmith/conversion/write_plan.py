"""What a rank has to know to write its part of a conversion, and how ranks come by it without making a model each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from shardsmith.conversion.heads import HeadType
from shardsmith.conversion.model_directory import find_model
from shardsmith.errors import RanksDisagreeError
from shardsmith.formats.by_path import open_source
from shardsmith.formats.dcp.shard_files import PlannedChunk, Stream, plan_chunks
from shardsmith.ground.ranks import Ranks
from shardsmith.tensors.dtypes import cast_specs
from shardsmith.tensors.tensors import TensorSource, TensorSpec

Layout = Literal["flat", "nested"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionOptions:
    """How to make a checkpoint to start from."""

    dtype: torch.dtype | None = None
    """Of floating-point tensors; None keeps that of the files."""
    layout: Layout = "flat"
    names: str | None = None
    """Name map of the model that is to train, if it is not that of the directory's config: "torchtitan:llama3/8B"."""
    trust_remote_code: bool = False
    future_predictor: HeadType | None = None
    """Type of the head, or None without one."""
    future_predictor_version: str = "1"
    """Of the fork of flame whose modules are to load it: "1", "2", or a checkpoint that shows it."""
    extra_modules: tuple[str, ...] = ()
    """``pkg.mod:factory={...}``."""
    seed: int = 0
    """Of the heads' random values."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WritePlan:
    """The tensors of a checkpoint to be made, and where they come from."""

    output: Path
    source: TensorSource
    """Of the model's tensors."""
    streams: Mapping[str, Stream]
    """By key."""
    chunks: Sequence[PlannedChunk]
    aliases: Mapping[str, str]
    """Key of a tied tensor -> the key that it is the same as."""
    containers: Mapping[str, tuple[str, ...]]
    """Where each key lies in the nested state dict, if it does."""
    stored: Mapping[str, str] | None
    """Key -> name of the tensor in the model's files, if each is there as it is, but for its dtype."""

    @property
    def nbytes(self) -> int:
        """Of all tensors, tied ones once."""
        return sum(stream.spec.nbytes for stream in self.streams.values())

    def close(self) -> None:
        """Let go of the model's files."""
        self.source.close()


def plan_on_ranks(ranks: Ranks, model: str, output: Path, options: ConversionOptions) -> WritePlan:
    """Return the plan of this rank: on rank 0 the ``ConversionPlan``, of which the others are told what they need.

    All ranks call it. Communicates through the store. Where tensors are made of several in the files, or of none, each
    rank plans by itself; otherwise only rank 0 imports the model's class, which takes seconds.

    Raises:
        RanksDisagreeError: this rank sees other files than rank 0.
        RankFailedError: planning failed on a rank. With one rank, what ``plan_conversion`` raises.
    """
    # Filled once, by the function that makes the plan on this rank: ``lead`` on rank 0, else ``follow``.
    plans: list[WritePlan] = []

    def lead() -> dict[str, Any] | None:
        plan = _planned(model, output, options)
        plans.append(plan)
        # None tells the other ranks to plan by themselves: their tensors are not those of the files.
        if plan.stored is None:
            return None
        dtypes = {name: plan.streams[key].spec.dtype for key, name in plan.stored.items()}
        return {
            "stored": dict(plan.stored),
            # As cast_specs takes them: rank 0 alone knows what the model's class keeps in float32.
            "kept": [name for name, dtype in dtypes.items() if options.dtype is not None and dtype != options.dtype],
            "aliases": dict(plan.aliases),
            "containers": {key: list(path) for key, path in plan.containers.items()},
        }

    told = ranks.lead(f"planning {output.name}", lead)

    def follow() -> None:
        if not plans:
            plans.append(_planned(model, output, options) if told is None else _followed(told, model, output, options))

    # A phase of its own, so that an error of one rank reaches all of them before anything is made.
    ranks.gather(f"planning {output.name}", follow)
    return plans[0]


def _planned(model: str, output: Path, options: ConversionOptions) -> WritePlan:
    from shardsmith.conversion.plan import (
        plan_conversion,
    )  # what it imports takes half a second, with the model seconds

    return plan_conversion(model, output, options)


def _followed(told: Mapping[str, Any], model: str, output: Path, options: ConversionOptions) -> WritePlan:
    directory = find_model(model)
    files = open_source(directory)
    specs = {s.name: s for s in cast_specs([*files.specs.values()], options.dtype, frozenset(told["kept"]))}
    # With other files here than on rank 0, this rank would write other tensors than the index says.
    missing = sorted(set(told["stored"].values()) - specs.keys())
    if missing:
        raise RanksDisagreeError(f"{directory} has no {', '.join(missing)} here, but on rank 0; nothing was written")
    streams = {
        key: Stream(TensorSpec(key, specs[name].shape, specs[name].dtype), files, name)
        for key, name in told["stored"].items()
    }
    return WritePlan(
        output=output,
        source=files,
        streams=streams,
        chunks=plan_chunks(stream.spec for stream in streams.values()),
        aliases=told["aliases"],
        containers={key: tuple(path) for key, path in told["containers"].items()},
        stored=told["stored"],
    )
