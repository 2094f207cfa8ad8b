"""Which parts of a checkpoint a run takes up, where it does not take all of them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from shardsmith.errors import MismatchError, UsageError
from shardsmith.formats.dcp.source import DcpSource
from shardsmith.formats.rank_shards import RankShards
from shardsmith.ground import layout
from shardsmith.ground.garbage import without_collection
from shardsmith.ground.printable import shown
from shardsmith.ground.ranks import Ranks
from shardsmith.manifest.metadata import CheckpointMetadata, FileRecord, read_metadata
from shardsmith.run_state.average import refuse_other_decay
from shardsmith.run_state.left_behind import refuse_left_behind
from shardsmith.run_state.resume import fill, refuse_other_step, refuse_separate
from shardsmith.run_state.saved_structure import with_number_keys, with_saved_structure
from shardsmith.run_state.train_state import TrainState
from shardsmith.run_state.verification import verify_state

log = logging.getLogger(__name__)

OnMissing = Literal["raise", "start"]

_KEYS = {"optimizer": "optimizer", "scheduler": "lr_scheduler", "ema": "ema_model", "rng": "rng"}
"""Part -> top-level key in a checkpoint; others have their own name there. The model's keys have none."""


def load_parts(
    checkpoint: Path,
    state: TrainState,
    ranks: Ranks,
    *,
    parts: Collection[str] | None = None,
    on_missing: OnMissing = "raise",
    verified: Mapping[str, FileRecord] | None = None,
) -> list[str]:
    """Load a checkpoint into what ``state`` was made of, or parts of it. All ranks; communicates.

    Args:
        checkpoint: A committed ``step-<n>``.
        state: The live state to fill.
        ranks: All ranks of the job.
        parts: Which of ``state.parts`` to load; None loads all. The others stay as they are.
        on_missing: What to do with those that the checkpoint does not have: ``"start"`` leaves them as they are.
        verified: Files to hash while they are read; see ``fill``.

    Returns:
        What is wrong with those, a line each, the same on all ranks. If anything is, the tensors of the parts hold
        what is not sound, and all else is as it was.

    Raises:
        UsageError: there is no such part in this run, or its average has another decay. Nothing was loaded.
        MismatchError: it does not hold what is wanted. Nothing was loaded.
        CorruptCheckpointError: what was loaded has not the digests that were recorded; with several ranks,
            RankFailedError.
    """
    if unknown := sorted(set(parts or ()) - set(state.parts)):
        raise UsageError(f"parts: this run has no {', '.join(unknown)}; it has {', '.join(state.parts)}")
    wanted = [part for part in state.parts if parts is None or part in parts]
    held = _held(checkpoint)
    # Without saved generators a run goes on with its own; that is no reason to stop.
    missing = [part for part in wanted if part not in ("model", "rng") and _KEYS.get(part, part) not in held]
    if missing and on_missing == "raise":
        raise _missing_error(checkpoint, missing, wanted)
    chosen = [part for part in wanted if part not in missing]
    metadata = read_metadata(checkpoint)
    if "ema" in chosen and state.ema is not None and metadata.ema is not None:
        refuse_other_decay(checkpoint, metadata.ema.get("decay", state.ema.decay), state.ema)
    reduced = state.reduced(chosen)
    ranks.gather(f"reading {checkpoint.name}", lambda: reduced.read_rank_states(checkpoint))
    with reduced.saved_states_made(metadata.tensors):
        if damage := _load(checkpoint, reduced, ranks, chosen, wanted, metadata, verified):
            return damage
    if ranks.is_leader:
        left = [part for part in state.parts if part not in chosen]
        rest = f", without {', '.join(left)}" if left else ""
        others = [part for part in ("optimizer", "scheduler") if _KEYS[part] in held and part not in state.parts]
        for part in others if parts is None else ():
            log.warning(
                "%s holds a state of the %s, and ShardedSave(%s=...) was not given: it is not loaded",
                shown(checkpoint),
                part,
                part,
            )
        log.info("resumed from %s: %s%s", shown(checkpoint), ", ".join(chosen) or "nothing", rest)
    return []


def _load(
    checkpoint: Path,
    state: TrainState,
    ranks: Ranks,
    chosen: Collection[str],
    wanted: Sequence[str],
    metadata: CheckpointMetadata,
    verified: Mapping[str, FileRecord] | None,
) -> list[str]:
    """``state`` has the chosen parts, ``wanted`` are those that were asked for. Else as ``load_parts``."""
    with_rng = "rng" in chosen and ranks.rank < metadata.world_size
    with without_collection():
        contents = state.collect(metadata.step, with_rng=with_rng, with_main="model" in chosen, to_load=True)
        if "model" in chosen or "ema" in chosen:
            refuse_separate(checkpoint, contents.tied, metadata)
        target, numbered = with_saved_structure(contents.state_dict, checkpoint, state.growing_keys)
        unused = state.without_unused(target, checkpoint)
    try:
        refuse_left_behind(ranks, checkpoint, lambda: state.left_behind(target, contents.tied, metadata.tensors))
        # Tensors are filled here, before it is known whether the files are sound: see `Resumption`.
        damage = fill(target, checkpoint, ranks, verified)
    except MismatchError as error:
        raise _explained(checkpoint, error, wanted) from None
    if damage:
        return damage
    refuse_other_step(checkpoint, metadata.step, target)
    verify_state(ranks, target, checkpoint, metadata)
    for key in state.growing_keys:
        with_number_keys(target[key], key, numbered)
    # From here on only sound values; all that is no tensor is handed back now.
    unused.put_back(target)
    ranks.gather(f"handing back {checkpoint.name}", lambda: _restore(state, target, ranks.is_leader))
    unused.forget()
    return []


def _held(checkpoint: Path) -> set[str]:
    """The first parts of all keys."""
    is_dcp = (checkpoint / layout.DCP_INDEX_FILE).exists()
    with contextlib.closing(DcpSource(checkpoint, to_load=True) if is_dcp else RankShards(checkpoint)) as source:
        # The manifest lists tensors only: a part that consists of objects is in the index alone.
        own = source.index.top_keys() if isinstance(source, DcpSource) else {*source.specs, *source.objects}
        return {key.split(".", 1)[0] for key in (*read_metadata(checkpoint).tensors, *own)}


def _restore(state: TrainState, target: Mapping[str, Any], is_leader: bool) -> None:
    try:
        with state.replacements_told(target) if is_leader else contextlib.nullcontext():
            state.restore(target)
    except Exception as error:  # of a user's load_state_dict, on this rank perhaps alone
        error.add_note(
            "Some of the run's state is loaded now and some is not: do not train on it, start the job again."
        )
        raise


def _missing_error(checkpoint: Path, missing: Sequence[str], wanted: Sequence[str]) -> MismatchError:
    lines = [f"{part}: this run has one, the checkpoint has none" for part in missing]
    rest = tuple(part for part in wanted if part not in missing)
    advice = (
        f'Nothing was loaded. hooks.resume(on_missing="start") lets {" and ".join(missing)} start anew; so does '
        f'ShardedSave(..., on_missing="start"). hooks.resume(parts={rest}) loads the rest alone.'
    )
    return MismatchError(checkpoint, f"has no {', '.join(missing)}", lines, advice)


def _explained(checkpoint: Path, error: MismatchError, wanted: Sequence[str]) -> MismatchError:
    """The error with the parts that do not fit, and the argument that leaves them out."""
    keys = {_KEYS.get(part, part): part for part in wanted} | ({"ema_state": "ema"} if "ema" in wanted else {})
    # A line begins with the key, and the key with the name of its part, unless it is one of the model's.
    at_fault = [keys.get(line.split(".", 1)[0].split(":", 1)[0], "model") for line in error.problems]
    parts = [part for part in wanted if part in at_fault]
    if "model" in parts:
        advice = (
            "Nothing was loaded. A resume needs the model that was saved: the same names, shapes and dtypes. To start "
            "a new run from these weights, give ShardedSave another directory, and load them with InitialLoad"
        )
        summary = f"the model of this run is not the one that was saved ({len(error.problems)} entries)"
        return MismatchError(checkpoint, summary, error.problems, advice)
    rest = tuple(part for part in wanted if part not in parts)
    summary = f"the {' and '.join(parts)} of this run is not the one that was saved ({len(error.problems)} entries)"
    advice = f"Nothing was loaded. hooks.resume(parts={rest}) continues with the other parts of the checkpoint."
    return MismatchError(checkpoint, summary, error.problems, advice)
