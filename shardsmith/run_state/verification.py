"""State of a run filled from files of single ranks, and the verification that what is live is what was saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint._traverse import set_element

from shardsmith.errors import CorruptCheckpointError, MismatchError
from shardsmith.formats.rank_shards import RankShards
from shardsmith.ground.garbage import without_collection
from shardsmith.ground.ranks import Ranks
from shardsmith.manifest.metadata import CheckpointMetadata
from shardsmith.run_state.contents import RNG
from shardsmith.sharding.local_boxes import local_boxes
from shardsmith.sharding.shares import add_up_boxes
from shardsmith.tensors.digest import Digest, digest_box
from shardsmith.tensors.dtypes import dtype_name
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
    with without_collection():
        return ranks.agree(
            f"verifying {path.name}", lambda: [*_shares(state)], lambda said: _compare(path, metadata, said), large=True
        )


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


def _shares(state: Mapping[str, Any]) -> Iterator[list[Any]]:
    """Key, dtype, and this rank's boxes with their shares in the digest."""
    shared = {name: value for name, value in state.items() if name != RNG}
    for key, value in flatten_state_dict(shared)[0].items():
        if isinstance(value, Tensor):
            shape = tuple(value.shape)
            boxes = [[box.offsets, box.sizes, str(digest_box(v, box, shape))] for box, v in local_boxes(value)]
            yield [key, dtype_name(value.dtype), boxes]


def _compare(path: Path, metadata: CheckpointMetadata, said: Sequence[Sequence[Any]]) -> int:
    tensors = dict.fromkeys((key, dtype) for shares in said for key, dtype, _ in shares)
    boxes_of = ((key, boxes) for shares in said for key, _, boxes in shares)
    found = add_up_boxes((key, (tuple(at), tuple(sizes)), text) for key, boxes in boxes_of for at, sizes, text in boxes)
    wrong = [f"{key}: ranks that hold the same part of it hold different values" for key in sorted(found.differing)]
    # All ranks' parts together: a digest is a sum over boxes, whoever holds them.
    for key, dtype in tensors:
        record = metadata.tensors.get(key)
        if record is None or record.dtype != dtype:
            wrong.append(f"{key}: is {dtype}, in the checkpoint {record.dtype if record else 'not there'}")
        elif str(found.digests.get(key, Digest())) != record.digest:
            wrong.append(f"{key}: its values are not those that were saved")
    if wrong:
        lines = "\n  ".join(dict.fromkeys([f"{len(wrong)} tensors are not what was saved", *wrong]))
        raise CorruptCheckpointError(path, f"{lines}\nThe run must not go on like this.")
    return len({key for key, _ in tensors})
