"""One save of a sharded checkpoint: collect, write, commit. All ranks act together; rank 0 alone makes it visible.

collect   main thread    every rank says what it is about to save; disagreement is refused before any write
write     any thread     every rank writes its shards into the attempt's directory and hands in a receipt
commit    any thread     rank 0 checks receipts, index and listing, writes metadata.json, renames
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from shardsmith import layout
from shardsmith.commit import Attempt, sync, write_file
from shardsmith.dcp.index import read_index
from shardsmith.dcp.writer import write_shards
from shardsmith.errors import RanksDisagreeError
from shardsmith.metadata import FileRecord, dtype_name
from shardsmith.ranks import Ranks
from shardsmith.record.description import Measured, describe
from shardsmith.run_state.staging import Stager

log = logging.getLogger(__name__)

RNG = "rng"
"""Key of what each rank saves for itself alone; everything else that two ranks both hold must agree."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """What one rank puts into a checkpoint."""

    step: int
    """Optimizer steps done."""
    state_dict: dict[str, Any]
    """Flat FQNs of the model, or ``{"model": ...}``; beside them ``optimizer``, ``ema_model`` and so on, nested."""
    ema: dict[str, Any] | None = None
    """Facts of the average, for people and for resuming."""
    tied: dict[str, str] = field(default_factory=dict)
    """Alias FQN -> kept FQN."""
    mesh: dict[str, Any] | None = None
    """Shape and dimension names of the parameters' device mesh."""


class SaveInProgress:
    """One save in progress. Make it on every rank; then ``begin``, ``stage`` or not, ``write``, ``commit``.

    Attributes:
        contents: What is to be saved, once ``begin`` has collected it.
    """

    contents: Contents

    def __init__(self, target: Path, ranks: Ranks, process_group: dist.ProcessGroup | None) -> None:
        self.target = target
        self._ranks = ranks
        self._group = process_group
        self._attempt: Attempt | None = None
        self._receipts: list[dict[str, Any]] = []

    def begin(self, collect: Callable[[], Contents]) -> None:
        """Collect what is to be saved and make the attempt's directory. Main thread; communicates.

        Raises:
            RankFailedError: on all ranks, if collecting failed on any, the ranks disagree, or the target exists.
        """
        phase = f"collecting {self.target.name}"
        # different keys are legal, with pipeline stages; different shapes or facts are not
        if not self._ranks.agree(phase, lambda: _fingerprint(self._collect(collect)), _all_equal):
            self._ranks.agree(phase, lambda: [_facts(self.contents), _specs(self.contents)], _refuse_disagreement)
        self._attempt_id = self._ranks.lead(f"making the directory for {self.target.name}", self._make_directory)

    def stage(self, stager: Stager) -> None:
        """Replace the contents by a copy, so that the live state may change while it is written. Main thread.

        Raises:
            RankFailedError: on all ranks, if copying failed on any. The attempt is gone.
        """
        with self._abandoned_on_error():
            self._ranks.gather(f"staging {self.target.name}", lambda: self._stage(stager))

    def write(self) -> None:
        """Write this rank's shards. Any thread; communicates over the process group and the store.

        Raises:
            RankFailedError: on all ranks, if writing failed on any. The attempt is gone.
        """
        with self._abandoned_on_error():
            self._receipts = self._ranks.gather(f"writing {self.target.name}", self._write)

    def commit(self, extra: Mapping[str, bytes] | None = None) -> Path:
        """Make the checkpoint visible and return its path. Any thread; communicates through the store.

        Args:
            extra: More files to put beside the shards: name -> content. Those of rank 0 count.

        Raises:
            RankFailedError: on all ranks, if rank 0 found it incomplete or could not rename it. The attempt is gone.
        """
        with self._abandoned_on_error():
            self._ranks.lead(f"committing {self.target.name}", lambda: self._commit(extra or {}))
        log.info("saved %s", self.target)
        return self.target

    @contextlib.contextmanager
    def _abandoned_on_error(self) -> Iterator[None]:
        """If the body raises, rank 0 deletes what was written."""
        try:
            yield
        except BaseException:
            if self._attempt is not None:
                self._attempt.abandon()
            raise

    def _stage(self, stager: Stager) -> None:
        self.contents = replace(self.contents, state_dict=stager.stage(self.contents.state_dict))

    def _collect(self, collect: Callable[[], Contents]) -> Contents:
        self.contents = collect()
        return self.contents

    def _make_directory(self) -> str:
        self._attempt = Attempt(self.target)
        return self._attempt.id

    def _write(self) -> dict[str, Any]:
        directory = layout.temporary_path(self.target, self._attempt_id)
        receipt = write_shards(self.contents.state_dict, directory, self._attempt_id, self._group)
        return {**receipt.to_plain(), "tied": self.contents.tied}

    def _commit(self, extra: Mapping[str, bytes]) -> None:
        assert self._attempt is not None
        directory = self._attempt.directory
        sync(directory / layout.DCP_INDEX_FILE)  # torch leaves it to the page cache
        receipt = Measured.merge(self._receipts)
        for name, content in extra.items():
            size = write_file(directory / name, content)
            receipt.files[name] = FileRecord(size=size, xxh3_128=xxhash.xxh3_128_hexdigest(content))
        metadata = describe(
            read_index(directory),
            receipt,
            attempt=self._attempt_id,
            step=self.contents.step,
            ema=self.contents.ema,
            tied={alias: kept for part in self._receipts for alias, kept in part["tied"].items()},
            world_size=self._ranks.size,
            mesh=self.contents.mesh,
        )
        sizes = {name: record.size for name, record in receipt.files.items()}
        sizes[layout.METADATA_FILE] = write_file(directory / layout.METADATA_FILE, metadata.to_json())
        self._attempt.commit(sizes)


def _facts(contents: Contents) -> dict[str, Any]:
    return {"step": contents.step, "ema": contents.ema, "mesh": contents.mesh}


def _specs(contents: Contents) -> dict[str, Any]:
    shared = {name: value for name, value in contents.state_dict.items() if name != RNG}
    return {key: [list(value.shape), dtype_name(value.dtype)] for key, value in _tensors(shared)}


def _fingerprint(contents: Contents) -> list[Any]:
    return [_facts(contents), xxhash.xxh3_128_hexdigest(json.dumps(_specs(contents), sort_keys=True).encode())]


def _all_equal(values: Sequence[Any]) -> bool:
    return all(value == values[0] for value in values)


def _tensors(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in state.items():
        if isinstance(value, Mapping):
            yield from _tensors(value, f"{prefix}{name}.")
        elif isinstance(value, torch.Tensor):
            yield f"{prefix}{name}", value


def _refuse_disagreement(reports: list[list[Any]]) -> None:
    """Raise unless all ranks have the same facts, and the same shape and dtype for every key that several hold."""
    problems = []
    facts = [report[0] for report in reports]
    for name in facts[0]:
        if any(other[name] != facts[0][name] for other in facts):
            problems.append(f"{name}: " + ", ".join(f"rank {r} {other[name]}" for r, other in enumerate(facts)))
    seen: dict[str, tuple[int, Any]] = {}
    for rank, (_, specs) in enumerate(reports):
        for key, spec in specs.items():
            first, expected = seen.setdefault(key, (rank, spec))
            if spec != expected:
                problems.append(f"{key}: rank {first} {tuple(expected)}, rank {rank} {tuple(spec)}")
    if problems:
        raise RanksDisagreeError(
            "\n  ".join(["the ranks are about to save different things; nothing was written", *problems])
        )
