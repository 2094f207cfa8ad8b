"""Make a checkpoint to start from: write, count, commit. One process, or the ranks of a job that share the writing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import xxhash

from shardsmith.conversion.counts import Count, count_tensors
from shardsmith.conversion.early_writing import EarlyWriting
from shardsmith.conversion.write_plan import WritePlan
from shardsmith.errors import RanksDisagreeError
from shardsmith.formats.dcp.cuts import cut_tensors
from shardsmith.formats.dcp.index_writer import write_indexes
from shardsmith.formats.dcp.shard_files import Place, Written, divide, write_shard_files
from shardsmith.formats.dcp.source import DcpSource
from shardsmith.formats.describe import Measured, describe
from shardsmith.ground import layout
from shardsmith.ground.commit import AnyAttempt, Attempt, attempt_directory, begin_attempt, require_space, sweep
from shardsmith.ground.ranks import Ranks
from shardsmith.manifest.metadata import FileRecord


def convert(
    plan: WritePlan,
    ranks: Ranks,
    progress: Callable[[int], None] | None = None,
    early: EarlyWriting | None = None,
) -> list[Count]:
    """Write a planned checkpoint and publish it when all of it is on disk; what is in it.

    All ranks call it with the same plan; each writes its part. Communicates through the store.

    Args:
        plan: The plan of the checkpoint.
        ranks: All ranks of the job.
        progress: Called from several threads with the number of bytes just written.
        early: What is being written of it already; with one rank only.

    Raises:
        RanksDisagreeError: the ranks planned different things. Nothing was written.
        CheckpointError, WriteError: reading or writing failed, with several ranks as RankFailedError. Nothing became
            visible.
    """
    # Filled on rank 0 alone. A list, so that ``finally`` finds
    # the attempt also if the phase then fails on another rank.
    attempt: list[AnyAttempt] = []
    try:
        # Before there is a directory: parts of different plans would make an index that fits no rank's files.
        ranks.agree(f"planning {plan.output.name}", lambda: _fingerprint(plan), _refuse_disagreement)
        attempt_id = ranks.lead(f"making the directory for {plan.output.name}", lambda: _begin(plan, attempt, early))
        directory = attempt_directory(plan.output, attempt_id)
        counts: list[list[Any]] = ranks.agree(
            f"writing {plan.output.name}",
            lambda: _write(plan, directory, ranks, progress, early),
            lambda parts: [list(asdict(count).values()) for count in _commit(plan, attempt[0], parts, ranks.size)],
            # A part names each tensor and each chunk, so it grows with the model.
            large=True,
        )
        return [Count(*count) for count in counts]
    finally:
        plan.close()
        # After a commit this does nothing; else what was written is deleted.
        for unfinished in attempt:
            unfinished.__exit__()


def _begin(plan: WritePlan, attempt: list[AnyAttempt], early: EarlyWriting | None) -> str:
    # Made and locked before the child was forked, and its space is checked; this is with one rank only.
    if early is not None:
        attempt.append(early.attempt)
        return early.attempt.id
    sweep(plan.output.parent)
    attempt.append(begun := begin_attempt(plan.output))
    if isinstance(begun, Attempt):
        require_space(begun.directory, plan.nbytes)
    return begun.id


def _write(
    plan: WritePlan,
    directory: Path,
    ranks: Ranks,
    progress: Callable[[int], None] | None,
    early: EarlyWriting | None,
) -> dict[str, Any]:
    """This rank's part, as JSON."""
    written, mine = Written(), divide(plan.chunks, range(len(plan.chunks)), ranks.size)[ranks.rank]
    if early is not None and (done := early.finish(plan.streams, plan.chunks, progress)) is not None:
        # The child's files come first, so the numbers of the rest begin behind them.
        written, mine = done[0], range(done[1], len(plan.chunks))
    files = written.measured.files
    if mine:
        rest = write_shard_files(plan.streams, plan.chunks, mine, directory, ranks.rank, progress, len(files))
        files.update(rest.measured.files)
        written.measured.digests.update(rest.measured.digests)
        written.places.update(rest.places)
    return {**written.measured.to_plain(), "places": {i: asdict(place) for i, place in written.places.items()}}


def _commit(plan: WritePlan, attempt: AnyAttempt, parts: list[dict[str, Any]], world_size: int) -> list[Count]:
    """On rank 0: index, manifest, a look at what is there, rename."""
    from shardsmith.conversion.plan import ConversionPlan

    assert isinstance(plan, ConversionPlan), "rank 0 makes the plan"
    measured = Measured.merge(parts)
    # JSON has strings for keys.
    places = {int(i): Place(**place) for part in parts for i, place in part["places"].items()}
    specs = {key: stream.spec for key, stream in plan.streams.items()}
    files = sorted(measured.files)
    indexes = write_indexes(
        cut_tensors(specs, plan.chunks, places, files),
        files=files,
        containers=plan.containers,
        attempt=attempt.id,
        aliases=plan.aliases,
    )
    # After the shards, and metadata.json after all others: it records their sizes and hashes.
    for name, made in indexes.items():
        content = b"".join(made)
        size = attempt.write(name, content)
        measured.files[name] = FileRecord(size=size, xxh3_128=xxhash.xxh3_128_hexdigest(content))
    # A tied tensor is stored once; its other name has the same values, and so the same digest.
    for alias, kept in plan.aliases.items():
        measured.digests[alias] = measured.digests[kept]
    # Read back through the reader that loads use: what the disk has is counted, not what was meant to be written.
    source = DcpSource(attempt.directory)
    try:
        source.check_archives()
        metadata = describe(
            source.index,
            measured,
            attempt=attempt.id,
            step=0,
            ema=None,
            tied=dict(plan.model.tied),
            world_size=world_size,
            mesh=None,
        )
        counts = count_tensors(plan, source.specs)
    finally:
        source.close()
    content = dataclasses.replace(metadata, initial=plan.initial).to_json()
    sizes = {name: record.size for name, record in measured.files.items()}
    sizes[layout.METADATA_FILE] = attempt.write(layout.METADATA_FILE, content)
    attempt.commit(sizes)
    return counts


def _fingerprint(plan: WritePlan) -> str:
    # Whatever decides which rank writes which chunk, and what the index says. The values are each rank's to read.
    specs = [[key, list(stream.spec.shape), str(stream.spec.dtype)] for key, stream in plan.streams.items()]
    text = json.dumps([specs, sorted(plan.aliases.items()), sorted(plan.containers)])
    return str(xxhash.xxh3_128_hexdigest(text.encode()))


def _refuse_disagreement(fingerprints: list[str]) -> None:
    if len(set(fingerprints)) > 1:
        raise RanksDisagreeError("the ranks see different models, or were given different options; nothing was written")
