"""Digests of live, sharded tensors: every rank takes those of its own boxes, and the shares are added up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from shardsmith.ground.ranks import Ranks
from shardsmith.manifest.metadata import TensorRecord
from shardsmith.sharding.assignment import Held, assign_boxes
from shardsmith.sharding.live_boxes import held_boxes
from shardsmith.sharding.shares import add_up_boxes
from shardsmith.tensors.digest import Digest, digest_box
from shardsmith.tensors.dtypes import dtype_name
from shardsmith.tensors.tensors import Chunk, Shape

OTHER_VALUES = "has other values"
_Share = tuple[str, list[int], list[int], str]
"""Name, offsets and sizes of a box, and its share of the tensor's digest."""


def digest_live(ranks: Ranks, phase: str, collect: Callable[[], Mapping[str, Tensor]]) -> dict[str, TensorRecord]:
    """Shape, dtype and digest of each tensor that the ranks hold together; every rank gets all of them.

    All ranks call it, on the main thread. Communicates through the store, not over tensors. Of replicas that differ
    (buffers under DDP, say) the one of the lowest rank counts.

    Args:
        ranks: All ranks of the job.
        phase: What this is for, for error messages.
        collect: The tensors by name, as they are now: DTensors, ShardedTensors or plain ones. Not changed.

    Raises:
        RankFailedError: on all ranks, if ``collect`` raised on any, or if they do not hold whole tensors together.
    """

    def look() -> tuple[dict[str, tuple[Shape, str]], list[_Share]]:
        tensors = collect()
        specs = {name: (tuple(tensor.shape), dtype_name(tensor.dtype)) for name, tensor in tensors.items()}
        return specs, [
            (held.name, [*held.box.offsets], [*held.box.sizes], str(digest_box(held.values, held.box, shape)))
            for held in held_boxes(tensors)
            for shape in [specs[held.name][0]]
        ]

    found = ranks.agree(phase, look, _add_up, large=True)
    return {
        name: TensorRecord(shape=tuple(shape), dtype=dtype, digest=digest)
        for name, (shape, dtype, digest) in found.items()
    }


def compare_digests(
    live: Mapping[str, TensorRecord], recorded: Mapping[str, TensorRecord], aliases: Mapping[str, str]
) -> dict[str, str]:
    """Return what differs, by tensor; empty if the live tensors are those that were recorded, bit for bit.

    Args:
        live: The tensors of the live model.
        recorded: The tensors that were saved.
        aliases: Names that are left out of one side or the other: alias -> the name of the same tensor.
    """
    problems = {name: _difference(live[name], recorded[name]) for name in live if name in recorded}
    problems |= dict.fromkeys(recorded.keys() - live.keys() - aliases.keys(), "recorded, but the model has none")
    problems |= dict.fromkeys(live.keys() - recorded.keys() - aliases.keys(), "was not recorded")
    return {name: problem for name, problem in sorted(problems.items()) if problem is not None}


def _difference(live: TensorRecord, recorded: TensorRecord) -> str | None:
    if (live.shape, live.dtype) != (recorded.shape, recorded.dtype):
        return f"is {live.shape} {live.dtype}, was {recorded.shape} {recorded.dtype}"
    return None if live.digest == recorded.digest else OTHER_VALUES


def _add_up(
    reports: Sequence[tuple[Mapping[str, tuple[Shape, str]], Sequence[_Share]]],
) -> dict[str, tuple[Shape, str, str]]:
    """Rank 0: the digests of whole tensors. Raises RanksDisagreeError where boxes overlap or leave holes."""
    specs: dict[str, tuple[Shape, str]] = {}
    shares: list[tuple[str, Chunk, str]] = []
    held: list[list[Held]] = []
    for said, boxes in reports:
        # ``| specs`` last: of a tensor on several ranks the lowest rank's description counts.
        specs = {name: (tuple(shape), dtype) for name, (shape, dtype) in said.items()} | specs
        held.append([(name, Chunk(tuple(offsets), tuple(sizes))) for name, offsets, sizes, _ in boxes])
        shares += [(*box, text) for box, (*_, text) in zip(held[-1], boxes, strict=True)]
    # Only for its check that boxes do not overlap and leave no hole; who would write what is not used.
    assign_boxes(held, {name: shape for name, (shape, _) in specs.items()}, dict.fromkeys(specs, 1))
    totals = add_up_boxes(shares).digests
    return {name: (shape, dtype, str(totals.get(name, Digest()))) for name, (shape, dtype) in specs.items()}
