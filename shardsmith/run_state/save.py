"""One save of a sharded checkpoint: collect, write, commit. All ranks act together; rank 0 alone makes it visible.

begin     main thread    every rank says what it holds, and copies what it is to write: all that the training waits for;
                         who writes what is agreed, once for all saves
write     any thread     every rank writes its file into the attempt's directory and hands in a receipt
commit    any thread     rank 0 writes the indexes and metadata.json from the receipts, checks the listing, renames
"""

from __future__ import annotations

import base64
import contextlib
import logging
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from shardsmith.formats.dcp.rank_file import encode, write_rank_file
from shardsmith.formats.describe import Measured, describe
from shardsmith.ground import layout
from shardsmith.ground.commit import AnyAttempt, Attempt, attempt_directory, begin_attempt
from shardsmith.ground.garbage import without_collection
from shardsmith.ground.host_folder import HostFolder
from shardsmith.ground.host_memory import require_memory
from shardsmith.ground.ranks import Ranks
from shardsmith.manifest.metadata import FileRecord
from shardsmith.manifest.weights import WeightsRecord
from shardsmith.run_state.alike import OPTIONS, are_equal, refuse_different_values, shared_values, signature
from shardsmith.run_state.contents import Contents, different_facts, facts_of
from shardsmith.run_state.held import Held
from shardsmith.run_state.share import Share, speakers_of
from shardsmith.run_state.whole_directory import to_receipt
from shardsmith.sharding.later_copy import LaterCopy, copy_now_and_later
from shardsmith.sharding.live_boxes import StagingBuffer
from shardsmith.sharding.windowed_copy import WindowedCopy
from shardsmith.tensors.tensors import Chunk

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Staging:
    """How the state is copied, so that the live one may change while it is written."""

    buffer: StagingBuffer
    """Holds the copy until ``write`` has ended."""
    later: Callable[[Mapping[str, Any]], Mapping[str, Tensor]] | None = None
    """Returns of a state dict the tensors, by key, that do not change before ``settle``: ``write`` copies those."""
    most_bytes: int | None = None
    """If the copy took more memory, it is left to ``feed``, which copies while ``write`` writes."""


class SaveInProgress:
    """One save in progress. Make it on every rank; then ``begin``, ``write``, ``commit``.

    Attributes:
        contents: What is to be saved, once ``begin`` has collected it.
    """

    contents: Contents
    _held: Held

    def __init__(
        self, target: Path, ranks: Ranks, share: Share | None = None, folder: HostFolder | None = None
    ) -> None:
        """Nothing is done yet.

        Args:
            target: The step.
            ranks: Those that save.
            share: Of the saves before this one, so that ranks need not agree again on who writes what.
            folder: The one that the target is in, if not all ranks see the same: then each has the files of the ranks
                that see it, and the manifest.
        """
        self.target = target
        self._folder = folder if folder is not None and folder.count > 1 else None
        self._ranks = ranks
        self._share = share or Share(ranks.rank)
        self._attempt: AnyAttempt | None = None
        self._receipts: list[dict[str, Any]] = []
        self._weight_records: dict[str, Any] = {}
        self._problems: list[str] = []
        self._staged: tuple[Iterable[Tensor], list[bytes]] | None = None
        self._later: LaterCopy | None = None
        self._windows: WindowedCopy | None = None

    def begin(
        self, collect: Callable[[], Contents], shared_keys: Collection[str] = (), staging: Staging | None = None
    ) -> None:
        """Collect what is to be saved, agree on who writes what, make the directory, copy. Main thread; communicates.

        Args:
            collect: Returns what this rank saves.
            shared_keys: Top-level keys of plain values, which must be the same on all ranks that have them.
            staging: Where the copy goes; None if the live state does not change before ``write`` has ended.

        Raises:
            RankFailedError: on all ranks, if collecting or copying failed on any, the ranks disagree, the target
                exists, or a host has too little memory for the copies. The attempt is gone.
            RanksDisagreeError: on all ranks, naming the values under ``shared_keys`` that are different.
        """
        phase = f"collecting {self.target.name}"
        answer = self._ranks.agree(phase, lambda: self._say(collect, shared_keys, staging), self._decide)
        # The usual save ends with the round above: all ranks know what to write, and have copied it.
        if answer is None:  # not the same on all ranks; or not all of them have all
            refuse_different_values(self._ranks, phase, self._shared)
            answer = self._ranks.agree(phase, lambda: ["", *self._says[1:]], self._decide)
        is_staged = answer["is_staged"]
        is_dealt_anew = answer["attempt"] is None
        if is_dealt_anew:
            entries, speakers = self._held.entries, answer["speakers"]
            answer = self._ranks.deal(phase, lambda: self._share.report(entries, speakers), self._settle, large=True)
            self._share.accept(entries, answer["share"])
        self._attempt_id = answer["attempt"]
        self._own = self._share.own
        with self._abandoned_on_error():
            if self._folder is not None:
                self._ranks.gather(phase, self._make_on_this_host)
            if staging is not None and not is_staged:
                self._stage_in_a_round(staging, is_dealt_anew)
        if staging is not None:
            self._held = Held(self._held.entries, [])  # the live tensors are needed no more

    def feed(self) -> None:
        """Copy what ``write`` is writing in another thread, as there is room. Main thread; no communication."""
        if self._windows is not None:
            self._windows.fill()

    def settle(self) -> None:
        """Return when all is copied, after which the live state may change. Main thread; no communication."""
        if self._later is not None:
            self._later.settle()

    def write(self) -> None:
        """Write this rank's file. Any thread; communicates through the store.

        Raises:
            RankFailedError: on all ranks, if writing failed on any. The attempt is gone.
        """
        with self._abandoned_on_error():
            phase = f"writing {self.target.name}"
            if self.contents.weights.directories:
                # At their full size, so that each rank can write at its own places.
                self._ranks.lead(phase, self._make_weight_files)
            self._receipts = self._ranks.gather(phase, self._write, large=True)
            if self.contents.weights.directories:
                # Only now, when all ranks have written into these files.
                records = self._ranks.gather(phase, self._hash_weights, large=True)
                self._weight_records = dict(chain(*(of_rank.items() for of_rank in records)))

    def commit(self, extra: Mapping[str, bytes] | None = None) -> Path:
        """Make the checkpoint visible and return its path. Any thread; communicates through the store.

        Args:
            extra: More files to put beside the shards: name -> content. Those of rank 0 count.

        Raises:
            RankFailedError: on all ranks, if rank 0 found it incomplete or could not rename it. The attempt is gone.
        """
        with self._abandoned_on_error():
            phase = f"committing {self.target.name}"
            # Rank 0 first: on other hosts nothing is committed that rank 0 has refused.
            told = self._ranks.lead(phase, lambda: self._commit(extra or {}))
            if told is not None:
                self._ranks.gather(phase, lambda: self._commit_on_this_host(told))
        log.debug("saved %s", self.target)
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

    def _say(self, collect: Callable[[], Contents], shared_keys: Collection[str], staging: Staging | None) -> list[Any]:
        """Collect, and copy if this rank knows what it writes: where all do, the training waits for one round only."""
        is_known, description = self._collect(collect, shared_keys)
        is_staged = is_known and staging is not None and self._has_staged(staging)
        self._says = [signature(self._shared), facts_of(self.contents), [is_known, description], is_staged]
        return self._says

    def _collect(self, collect: Callable[[], Contents], shared_keys: Collection[str]) -> tuple[bool, str]:
        self.contents = collect()
        self._shared = shared_values(self.contents.state_dict, shared_keys)
        self._shared |= shared_values({OPTIONS: self.contents.options}, [OPTIONS])
        with without_collection():
            self._held = self._share.known.hold(self.contents.state_dict)
        return self._share.vote(self._held.entries, self.contents.weights.placed)

    def _decide(self, said: Sequence[Any]) -> Any:
        """Rank 0: the attempt, if everybody knows what to write; else who is to describe what there is.

        None if shared values are to be compared one by one before that.
        """
        signatures, facts, votes, staged = zip(*said, strict=True)
        if not are_equal(signatures):
            return None
        # Kept for ``_settle``, which reports them together with tensors that differ.
        self._problems = different_facts(facts)
        if not self._problems and all(is_known for is_known, _ in votes):
            return {"attempt": self._make_directory(), "is_staged": all(staged)}
        return {"attempt": None, "is_staged": False, "speakers": speakers_of(votes)}

    def _settle(self, reports: Sequence[Any]) -> list[dict[str, Any]]:
        """Rank 0: what each rank is to know."""
        with without_collection():  # of boxes there are ranks times tensors
            shares = self._share.settle(reports, self._problems)
        attempt = self._make_directory()  # after everything that can be refused: nothing is left to be removed then
        return [{"attempt": attempt, "share": share} for share in shares]

    def _make_directory(self) -> str:
        self._attempt = begin_attempt(self.target)
        return self._attempt.id

    def _has_staged(self, staging: Staging) -> bool:
        """Copy without a word to the others; whether that was possible. What failed fails again in the round of all."""
        if not staging.buffer.has_room:
            return False
        self._own = self._share.own
        try:
            self._stage(staging)
        except Exception:
            log.debug("will be copied again", exc_info=True)
            return False
        return True

    def _stage_in_a_round(self, staging: Staging, is_dealt_anew: bool) -> None:
        phase = f"staging {self.target.name}"
        # Counting memory costs a round of all ranks: only where the copy may need more than the last one did.
        if is_dealt_anew or not staging.buffer.has_room:
            self._require_memory(phase, staging.buffer, staging.most_bytes)
        self._ranks.gather(phase, lambda: self._stage(staging))

    def _stage(self, staging: Staging) -> None:
        with without_collection():
            self._later = None
            tensors = self._tensors()
            self._windows = self._windowed(tensors, staging.buffer, staging.most_bytes)
            if self._windows is not None:
                self._staged = self._windows.take(), self._objects()
            else:
                later = staging.later(self.contents.state_dict) if staging.later is not None else {}
                self._stage_whole(tensors, staging.buffer, later)

    @staticmethod
    def _windowed(tensors: list[Tensor], buffer: StagingBuffer, most_bytes: int | None) -> WindowedCopy | None:
        """The copy in parts; None if all fits at once."""
        if most_bytes is None or sum(tensor.nbytes for tensor in tensors) <= most_bytes:
            return None
        return WindowedCopy(tensors, [tensor.dtype for tensor in tensors], (buffer, buffer.beside), most_bytes)

    def _require_memory(self, phase: str, buffer: StagingBuffer, most_bytes: int | None) -> None:
        require_memory(self._ranks, phase, lambda: self._growth(buffer, most_bytes))
        buffer.has_room = True

    def _growth(self, buffer: StagingBuffer, most_bytes: int | None) -> int:
        """How many more bytes of memory the copy takes."""
        growth = buffer.growth(*self._tensors_and_dtypes())
        return growth if most_bytes is None else min(growth, most_bytes)

    def _stage_whole(self, tensors: list[Tensor], buffer: StagingBuffer, later: Mapping[str, Tensor]) -> None:
        copies = buffer.places(tensors, [tensor.dtype for tensor in tensors])
        keys = [self._held.entries[i].key for i, _, _ in self._own.tensors]
        self._later = copy_now_and_later(keys, [later.get(key) for key in keys], tensors, copies)
        self._staged = copies, self._objects()

    @torch.no_grad()
    def _tensors(self) -> list[Tensor]:
        found = []
        for i, position, part in self._own.tensors:
            values = self._held.values(i)[position]
            found.append(values if part is None else values[part.within(Chunk.whole(part.sizes))])
        return found

    def _tensors_and_dtypes(self) -> tuple[list[Tensor], list[torch.dtype]]:
        tensors = self._tensors()
        return tensors, [tensor.dtype for tensor in tensors]

    def _objects(self) -> list[bytes]:
        return [encode(self._held.leaves[i]) for i in self._own.objects]

    def _write(self) -> dict[str, Any]:
        tensors, objects = self._staged or (self._tensors(), self._objects())
        directory = attempt_directory(self.target, self._attempt_id)
        if self._later is not None:
            self._later.copy()
        values = iter(tensors)
        try:
            weights = self.contents.weights.write(self._own.weights, values, directory, self._ranks.rank)
            receipt = to_receipt(write_rank_file(self._own.file, values, objects, directory), weights.pieces)
        finally:
            # Also after an error: the main thread may be waiting in ``feed`` for a window that nobody writes any more.
            if self._windows is not None:
                self._windows.stop()
        # Only now: whether tensors changed during the copy is known once the training thread has settled it.
        if self._later is not None:
            self._later.result()
        return {**receipt, "stored": weights.to_plain(), "tied": self.contents.tied}

    def _make_weight_files(self) -> None:
        assert self._attempt is not None
        self.contents.weights.make_files(self._attempt.directory)

    def _hash_weights(self) -> dict[str, Any]:
        directory = attempt_directory(self.target, self._attempt_id)
        records = self.contents.weights.hash_files(directory, self._ranks.rank, self._ranks.size)
        return {name: asdict(record) for name, record in records.items()}

    def _complete_weights(self, measured: Measured) -> dict[str, WeightsRecord] | None:
        """Rank 0: make the directories of the weights complete; what metadata.json says of them."""
        assert self._attempt is not None
        weights = self.contents.weights
        if not weights.directories:
            return None
        # A tied tensor has the digest of the one that was written.
        measured.digests.update({alias: measured.digests[kept] for alias, kept in weights.tied.items()})
        records = {name: FileRecord(**record) for name, record in self._weight_records.items()}
        stored = weights.add_up([receipt["stored"] for receipt in self._receipts])
        measured.files.update(weights.complete(self._attempt.directory, stored, records))
        return weights.records(self._share.whole.specs)

    def _make_on_this_host(self) -> None:
        """Make the directory where rank 0 cannot."""
        assert self._folder is not None
        if self._folder.is_leader and self._attempt is None:
            self._attempt = Attempt(self.target, self._attempt_id)

    def _commit_on_this_host(self, told: Mapping[str, Any]) -> None:
        """Commit what rank 0 has committed on its own host."""
        assert self._folder is not None
        if self._folder.is_leader and not self._ranks.is_leader:
            assert self._attempt is not None
            for name, packed in told["files"].items():
                self._attempt.write(name, zlib.decompress(base64.b64decode(packed)))
            self._attempt.commit(self._on_this_host(told["sizes"], told["ranks"]))

    def _on_this_host(self, sizes: Mapping[str, int], ranks: Mapping[str, int]) -> dict[str, int]:
        """Of all files those that lie here. ``ranks``: which rank has written which file, if not rank 0 for all."""
        here = range(self._ranks.size) if self._folder is None else self._folder.ranks_here
        return {name: size for name, size in sizes.items() if name not in ranks or ranks[name] in here}

    def _commit(self, extra: Mapping[str, bytes]) -> dict[str, Any] | None:
        """Rank 0; what the leaders of other hosts are to do, if there are any."""
        assert self._attempt is not None
        whole = self._share.whole
        measured = whole.measured(self._receipts)
        beside = {**whole.indexes(self._receipts, self._attempt_id), **extra}
        for name, content in beside.items():
            size = self._attempt.write(name, content)
            measured.files[name] = FileRecord(size=size, xxh3_128=xxhash.xxh3_128_hexdigest(content))
        weights = self._complete_weights(measured)
        metadata = describe(
            whole.contents(self._attempt.directory),
            measured,
            attempt=self._attempt_id,
            step=self.contents.step,
            ema=self.contents.ema,
            tied={alias: kept for part in self._receipts for alias, kept in part["tied"].items()},
            world_size=self._ranks.size,
            mesh=self.contents.mesh,
            weights=weights,
            names=self.contents.names,
        )
        sizes = {name: record.size for name, record in measured.files.items()}
        # The manifest is written last: it has the hash of every other file, and marks the step as complete.
        beside[layout.METADATA_FILE] = metadata.to_json()
        sizes[layout.METADATA_FILE] = self._attempt.write(layout.METADATA_FILE, beside[layout.METADATA_FILE])
        written_by = {name: rank for rank, name in enumerate(whole.file_names)}
        self._attempt.commit(self._on_this_host(sizes, written_by))
        if self._folder is None:
            return None
        # Told through the store, as text; level 1 is quick, and an index compresses well.
        packed = {name: base64.b64encode(zlib.compress(content, 1)).decode() for name, content in beside.items()}
        return {"files": packed, "sizes": sizes, "ranks": written_by}
