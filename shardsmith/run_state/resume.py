"""Load parts of a checkpoint of ours, of either kind, and verify that the run has them now."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from shardsmith.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    MismatchError,
    RankFailedError,
)
from shardsmith.formats.dcp.load import LocalLoad
from shardsmith.formats.dcp.single_read import deal_files
from shardsmith.formats.dcp.source import DcpSource
from shardsmith.formats.rank_shards import RankShards, unpack_object
from shardsmith.ground import layout
from shardsmith.ground.ranks import Ranks
from shardsmith.manifest.metadata import CheckpointMetadata, FileRecord, read_metadata
from shardsmith.run_state.average import Average, refuse_other_decay
from shardsmith.run_state.left_behind import refuse_left_behind
from shardsmith.run_state.saved_structure import with_number_keys, with_saved_structure
from shardsmith.run_state.train_state import TrainState
from shardsmith.run_state.verification import fill_state, verify_state
from shardsmith.tensors.checkpoint_keys import EMA
from shardsmith.tensors.tensors import TensorSource, read_tensor

DATA_STATUS = "data_status"
"""Key of what each rank says of its data loader."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """Which parts to load."""

    model: bool = True
    ema: bool = True
    optimizer: bool = True
    scheduler: bool = True
    data_status: bool = True
    rng: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """Those that are wanted."""
        return tuple(name for name in self.__slots__ if getattr(self, name))


def load_ours(path: Path, state: TrainState, wanted: Wanted, ranks: Ranks) -> tuple[int, int, Any]:
    """Load into what ``state`` was made of. All ranks; communicates.

    Returns:
        The step, how many tensors were verified, and this rank's data status.

    Raises:
        CheckpointNotFoundError: it has no average, and one is wanted.
        UsageError: its average has another decay.
        MismatchError: it does not hold what is wanted. Nothing was loaded.
        CorruptCheckpointError: what was loaded has not the digests that were recorded.
    """
    metadata = read_metadata(path)
    if state.ema is not None:
        _compare_averages(path, state.ema, metadata)
    # For ranks that the saving run did not have, there are none.
    with_rng = wanted.rng and ranks.rank < metadata.world_size
    with state.saved_states_made(metadata.tensors):
        contents = state.collect(metadata.step, with_rng=with_rng, with_main=wanted.model, to_load=True)
        refuse_separate(path, contents.tied, metadata)
        target, numbered = with_saved_structure(contents.state_dict, path, state.growing_keys)
        unused = state.without_unused(target, path)
        refuse_left_behind(ranks, path, lambda: state.left_behind(target, contents.tied, metadata.tensors))
        fill(target, path, ranks)
        refuse_other_step(path, metadata.step, target)
        for key in state.growing_keys:
            with_number_keys(target[key], key, numbered)
        status = _read_status(path, ranks.rank) if wanted.data_status else None
        unused.put_back(target)
        state.restore(target)
        unused.forget()
    # Collected anew: what model, optimizer and so on hold now, not what was handed to them.
    live = state.collect(metadata.step, with_rng=False, with_main=wanted.model).state_dict
    return metadata.step, verify_state(ranks, live, path, metadata), status


def fill(
    target: dict[str, Any], path: Path, ranks: Ranks, verified: Mapping[str, FileRecord] | None = None
) -> list[str]:
    """Fill what ``TrainState.collect`` gave from a checkpoint of either kind. All ranks; communicates.

    Args:
        target: Its tensors are filled in place, other values are replaced.
        path: The checkpoint.
        ranks: Those that load.
        verified: Files to hash while they are read, by name. Only of a DCP directory.

    Returns:
        What is wrong with those, a line each, the same on all ranks. If anything is, tensors have been filled with it,
        and nothing else has been.

    Raises:
        MismatchError: it does not hold what is wanted. Nothing was loaded. From files of single ranks, with several
            ranks: RankFailedError. Of what fails on other ranks only, RankFailedError.
    """
    if not _is_dcp(path):
        ranks.gather(f"loading {path.name}", lambda: _fill_from_ranks(target, path))
        return []
    with contextlib.closing(LocalLoad(target, path)) as load:
        try:
            if verified:
                return _fill_verified(load, ranks, verified)
            # All ranks compare before one fills, so that a refusal leaves the run as it was.
            ranks.gather(f"comparing {path.name}", load.compare)
            ranks.gather(f"loading {path.name}", load.fill)
            return []
        except RankFailedError as error:
            if isinstance(error.__cause__, CheckpointError):
                raise error.__cause__ from None
            raise


def _fill_verified(load: LocalLoad, ranks: Ranks, verified: Mapping[str, FileRecord]) -> list[str]:
    name, sizes = load.directory.name, {file: record.size for file, record in verified.items()}

    def compare() -> dict[str, int]:
        load.compare()
        return load.wanted_bytes()

    def joined(found: list[list[str]]) -> list[str]:
        return [*chain(*found)]

    dealt = ranks.agree(f"comparing {name}", compare, lambda wanted: deal_files(wanted, sizes))
    mine = {file: verified[file] for file in dealt[ranks.rank]}
    damage: list[str] = ranks.agree(f"loading {name}", lambda: load.fill_tensors(mine), joined)
    # What is no tensor is taken from sound files only.
    if not damage:
        ranks.gather(f"loading {name}", load.fill_objects)
    return damage


def _fill_from_ranks(target: dict[str, Any], path: Path) -> None:
    with contextlib.closing(RankShards(path)) as source:
        fill_state(target, source)


def refuse_other_step(path: Path, step: int, state: Mapping[str, Any]) -> None:
    """Raise CorruptCheckpointError if the state that was loaded is of another step than metadata.json says."""
    found = state.get("train_state", {}).get("step")
    if found is not None and int(found) != step:
        raise CorruptCheckpointError(path, f"holds the state of step {int(found)}, but metadata.json is of step {step}")


def refuse_separate(path: Path, tied: Mapping[str, str], metadata: CheckpointMetadata) -> None:
    """Raise MismatchError if tensors that are one in this model, alias -> kept FQN, are different ones in a checkpoint.

    Both would be loaded into the same memory. No communication.
    """
    problems = []
    for alias, kept in tied.items():
        # In the flat layout, in the nested one, and in the average.
        for prefix in ("", "model.", layout.EMA_PREFIX):
            one, other = (metadata.tensors.get(prefix + name) for name in (alias, kept))
            if one is not None and other is not None and one.digest != other.digest:
                problems.append(f"{prefix}{alias}: one with {prefix}{kept} in this model, another in the checkpoint")
    if problems:
        advice = (
            "Nothing was loaded. A run with tied weights cannot take up a model whose weights are not: make the model "
            "without ties (in transformers: tie_word_embeddings=False)"
        )
        raise MismatchError(path, "holds weights apart that are tied in this model", problems, advice)


def _is_dcp(path: Path) -> bool:
    return (path / layout.DCP_INDEX_FILE).exists()


def _compare_averages(path: Path, average: Average, metadata: CheckpointMetadata) -> None:
    if EMA not in metadata.models:
        raise CheckpointNotFoundError(path, "has no average; pass load_ema=False")
    if (saved := (metadata.ema or {}).get("decay")) is not None:
        refuse_other_decay(path, saved, average)


def _read_status(path: Path, rank: int) -> Any:
    source: TensorSource = DcpSource(path, to_load=True) if _is_dcp(path) else RankShards(path)
    try:
        key = f"{DATA_STATUS}.rank-{rank}"
        return unpack_object(read_tensor(source, key)) if key in source.specs else None
    finally:
        source.close()
