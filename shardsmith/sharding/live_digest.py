"""Digests of live, sharded tensors: every rank takes those of its own boxes, and the shares are added up."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from shardsmith.errors import RanksDisagreeError
from shardsmith.ground.ranks import Ranks
from shardsmith.manifest.metadata import TensorRecord
from shardsmith.sharding.digest_sums import Digested, DigestSums, Spec, digest_boxes, sum_digests
from shardsmith.tensors.tensors import Shape

OTHER_VALUES = "has other values"


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

    def look() -> dict[str, Digested]:
        return {name: digest_boxes(tensor) for name, tensor in collect().items()}

    found = sum_digests(ranks, phase, look, _records)
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


def _records(sums: DigestSums) -> dict[str, tuple[Shape, str, str]]:
    """On rank 0, as JSON."""
    # Of a tensor on several ranks the lowest rank's description counts.
    specs: dict[str, Spec] = {}
    for spec in sums.specs:
        specs.setdefault(spec.name, spec)
    if problems := sums.not_whole():
        lines = (f"{name}: {problems[name]}" for name in specs if name in problems)
        raise RanksDisagreeError("\n  ".join(["the ranks do not hold whole tensors together", *lines]))
    return {name: (spec.shape, spec.dtype, str(sums.digests[name])) for name, spec in specs.items()}
