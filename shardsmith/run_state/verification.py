"""State of a run filled from files of single ranks, and the verification that what is live is what was saved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint._traverse import set_element

from shardsmith.errors import CorruptCheckpointError, MismatchError
from shardsmith.formats.rank_shards import RankShards
from shardsmith.ground.ranks import Ranks
from shardsmith.manifest.metadata import CheckpointMetadata
from shardsmith.run_state.contents import RNG
from shardsmith.sharding.digest_sums import Digested, DigestSums, digest_boxes, sum_digests
from shardsmith.sharding.local_boxes import local_boxes
from shardsmith.tensors.tensors import read_into


def fill_state(state: dict[str, Any], source: RankShards) -> None:
    """Fill a state dict in place, of which everything must be stored just so. No communication.

    Args:
        state: Nested, of tensors, DTensors, ShardedTensors and other values, as ``TrainState.collect`` gives it.
        source: The files of single ranks.

    Raises:
        MismatchError: naming all keys that are missing or have another kind, shape or dtype. Nothing was filled.
    """
    flat, places = flatten_state_dict(state)
    # All that is wrong is found before anything is filled.
    if problems := [line for key, value in flat.items() if (line := _problem(key, value, source))]:
        summary = f"{len(problems)} of {len(flat)} entries are not stored as they were asked for"
        raise MismatchError(source.path, summary, problems, "Nothing was loaded. Ask only for what was saved.")
    for key, value in flat.items():
        if not isinstance(value, Tensor):
            set_element(state, places[key], source.read_object(key))
            continue
        for box, values in local_boxes(value):
            read_into(source, key, box, values)


def verify_state(ranks: Ranks, state: Mapping[str, Any], path: Path, metadata: CheckpointMetadata) -> int:
    """Compare the digest of every live tensor with the one that was recorded when it was saved; how many there are.

    All ranks call it with what ``TrainState.collect`` gives after a load. Communicates through the store. What each
    rank has for itself alone is left out.

    Raises:
        RankFailedError: on all ranks, naming every tensor that differs. With one rank, CorruptCheckpointError.
    """
    phase = f"verifying {path.name}"
    return sum_digests(ranks, phase, lambda: _digested(state), lambda sums: _compare(path, metadata, sums))


def _problem(key: str, value: Any, source: RankShards) -> str | None:
    spec = source.specs.get(key)
    if spec is None:
        return f"{key}: not in the checkpoint"
    is_object = key in source.objects
    if is_object == isinstance(value, Tensor):
        return f"{key}: saved as {'an object' if is_object else 'a tensor'}, the other was asked for"
    if is_object or (spec.shape, spec.dtype) == (tuple(value.size()), value.dtype):
        return None
    return f"{key}: saved {spec.shape} {spec.dtype}, asked for {tuple(value.size())} {value.dtype}"


def _digested(state: Mapping[str, Any]) -> dict[str, Digested]:
    """This rank's boxes of tensors that ranks hold together."""
    shared = {name: value for name, value in state.items() if name != RNG}
    flat = flatten_state_dict(shared)[0]
    return {key: digest_boxes(value) for key, value in flat.items() if isinstance(value, Tensor)}


def _compare(path: Path, metadata: CheckpointMetadata, sums: DigestSums) -> int:
    wrong = [f"{key}: ranks that hold the same part of it hold different values" for key in sorted(sums.differing)]
    # Ranks may have one key in several dtypes.
    for key, dtype in dict.fromkeys((spec.name, spec.dtype) for spec in sums.specs):
        record = metadata.tensors.get(key)
        if record is None or record.dtype != dtype:
            wrong.append(f"{key}: is {dtype}, in the checkpoint {record.dtype if record else 'not there'}")
        elif str(sums.digests[key]) != record.digest:
            wrong.append(f"{key}: its values are not those that were saved")
    if wrong:
        lines = "\n  ".join(dict.fromkeys([f"{len(wrong)} tensors are not what was saved", *wrong]))
        raise CorruptCheckpointError(path, f"{lines}\nThe run must not go on like this.")
    return len(sums.digests)
