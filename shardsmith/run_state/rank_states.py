"""State that each rank has for itself, such as that of its data loader: saved apart, and given back to its rank."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.distributed.checkpoint.stateful import Stateful

from shardsmith.checking.arguments import checked
from shardsmith.errors import MismatchError, UsageError
from shardsmith.formats.dcp.source import DcpSource
from shardsmith.formats.rank_shards import pack_object, unpack_object
from shardsmith.run_state.loader_states import reshard_loader
from shardsmith.run_state.readable import made_readable

TOPOLOGY = "topology"
"""Key of what the ranks were, beside their states."""

Reshard = Callable[[Sequence[Any], int, int], Any]
"""``reshard(states, rank, world_size)``: this rank's state, from those of all ranks that saved, in their order."""


class PerRank:
    """An object of which each rank has its own state. Made by ``per_rank``.

    Attributes:
        thing: The object.
    """

    def __init__(
        self, thing: Stateful, reshard: Reshard | None, on_topology_change: Literal["raise", "restart"]
    ) -> None:
        self.thing = thing
        self._reshard = reshard
        self._on_change = on_topology_change

    def state_dict(self) -> dict[str, Any]:
        """Return the state of this rank."""
        return self.thing.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the state of this rank."""
        self.thing.load_state_dict(state_dict)

    def pack(self, key: str, rank: int, topology: Mapping[str, Any]) -> dict[str, Any]:
        """What this rank puts into a checkpoint. Raises UsageError if it could not be read without running code."""
        state = made_readable({key: self.thing.state_dict()})
        try:
            packed = pack_object(state[key]).numpy().tobytes()
        except UsageError as error:  # a rare kind of mapping
            raise UsageError(f"{key}: {error}: return plain dicts, lists, tensors and numbers") from error
        return {f"rank-{rank}": base64.b64encode(packed).decode(), TOPOLOGY: dict(topology)}

    def choose(self, key: str, checkpoint: Path, rank: int, topology: Mapping[str, Any]) -> Any:
        """This rank's state out of a checkpoint; None if it is to start anew. Reads; no communication.

        Raises:
            MismatchError: there is no such state, or it is of other ranks and nothing says what becomes of it.
        """
        saved, states = _read(checkpoint, key, rank, topology)
        if saved == dict(topology):
            return states[0]
        # The user's own function comes before what is known of loaders.
        if self._reshard is not None:
            return self._reshard(states, rank, topology["world_size"])
        problem = "it is not a StatefulDataLoader over a StatefulDistributedSampler"
        try:
            resharded = reshard_loader(self.thing, states, rank, topology["world_size"])
            if resharded is not None:
                return resharded
        except ValueError as error:
            problem = str(error)
        if self._on_change == "restart":
            return None
        line = f"{key}: saved by {_words(saved)}, this run is {_words(topology)}; {problem}"
        advice = (
            "Nothing was loaded. Resume on the ranks that saved it; or pass per_rank(..., reshard=function) that makes "
            'the state of a rank from those of all, or per_rank(..., on_topology_change="restart") to begin anew.'
        )
        raise MismatchError(checkpoint, f"{key} holds the state of other ranks", [line], advice)


@checked
def per_rank(
    thing: Stateful,
    *,
    reshard: Callable[..., Any] | None = None,
    on_topology_change: Literal["raise", "restart"] = "raise",
) -> PerRank:
    """Mark an object of which each rank has its own state: ``stateful={"data": per_rank(loader)}``.

    It is saved under ``<key>.rank-<r>``, with the number of ranks and the device mesh. A run that resumes on the same
    ranks and mesh gets it back exactly. On others a ``StatefulDataLoader`` of torchdata over a
    ``StatefulDistributedSampler`` goes on with the sample where the run was, if the samples that were used divide up.

    Args:
        thing: Has ``state_dict`` and ``load_state_dict``.
        reshard: Makes the state of one rank for another number of ranks, or another mesh: it is called with the states
            of all ranks that saved, in their order, with this rank, and with the number of ranks now.
        on_topology_change: What to do if there is no such function: ``"raise"``, or ``"restart"``, which leaves the
            object as it is.
    """
    return PerRank(thing, reshard, on_topology_change)


def _read(checkpoint: Path, key: str, rank: int, topology: Mapping[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """What the ranks were that saved, and the states of all of them; of this rank alone if they are the same."""
    with contextlib.closing(DcpSource(checkpoint, to_load=True)) as source:
        prefix, objects = f"{key}.rank-", source.index.objects
        names = [f"{key}.{TOPOLOGY}.{name}" for name in ("world_size", "mesh")]
        saved = {name.rpartition(".")[2]: source.read_object(name) for name in names if name in objects}
        # The usual case, which does not read the states of the other ranks.
        if saved == dict(topology) and f"{prefix}{rank}" in objects:
            return saved, [_unpack(source.read_object(f"{prefix}{rank}"))]
        there = [name for name, _ in source.index.below(key) if name in objects]
        ranks = sorted(int(name.removeprefix(prefix)) for name in there if name.startswith(prefix))
        if not ranks:
            line = f"{key}: " + ("saved as one state for all ranks" if there else "not in the checkpoint")
            advice = "Nothing was loaded. Resume without it: hooks.resume(parts=...) names what to load."
            raise MismatchError(checkpoint, f"{key} has no state of single ranks", [line], advice)
        return saved, [_unpack(source.read_object(f"{prefix}{one}")) for one in ranks]


def _unpack(text: str) -> Any:
    # A copy, as torch wants memory that can be written.
    return unpack_object(torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype=np.uint8).copy()))


def _words(topology: Mapping[str, Any]) -> str:
    mesh = f", mesh {topology['mesh']}" if topology.get("mesh") not in (None, "none") else ""
    return f"{topology['world_size']} ranks{mesh}"
