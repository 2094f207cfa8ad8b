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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardsmith.formats.dcp.rank_file import encode, write_rank_file
from shardsmith.formats.describe import Measured, describe
from shardsmith.ground import layout
from shardsmith.ground.commit import AnyAttempt, Attempt, attempt_directory, begin_attempt
from shardsmith.ground.garbage import without_collection
from shardsmith.ground.host_folder import HostFolder
from shardsmith.ground.ranks import Ranks
from shardsmith.manifest.metadata import FileRecord
from shardsmith.manifest.weights import WeightsRecord
from shardsmith.run_state.alike import OPTIONS, are_equal, refuse_different_values, shared_values, signature
from shardsmith.run_state.contents import Contents, different_facts, facts_of
from shardsmith.run_state.held import Held
from shardsmith.run_state.share import Share, speakers_of
from shardsmith.run_state.weights_write import HostPart, WeightsWrite
from shardsmith.run_state.whole_directory import as_bytes, to_receipt, write_content
from shardsmith.sharding.live_boxes import StagingBuffer
from shardsmith.sharding.staged_copy import StagedCopy
from shardsmith.sharding.step_copies import StepCopies
from shardsmith.tensors.checkpoint_keys import KeyPath

log = logging.getLogger(__name__)

IsLater = Callable[[KeyPath], bool]
"""Takes the path of a tensor in the state; returns whether its copy may be made later."""


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
        self._host: HostPart | None = None
        self._receipts: list[dict[str, Any]] = []
        self._weight_records: dict[str, FileRecord] = {}
        self._problems: list[str] = []
        self._buffer: StagingBuffer | None = None
        self._later: IsLater | None = None
        self._step_copies: StepCopies | None = None
        self._staged: tuple[StagedCopy, list[bytes]] | None = None

    def begin(
        self,
        collect: Callable[[], Contents],
        shared_keys: Collection[str] = (),
        buffer: StagingBuffer | None = None,
        later: IsLater | None = None,
        step_copies: StepCopies | None = None,
    ) -> None:
        """Collect what is to be saved, agree on who writes what, make the directory, copy. Main thread; communicates.

        Args:
            collect: Returns what this rank saves.
            shared_keys: Top-level keys of plain values, which must be the same on all ranks that have them.
            buffer: Where the copy goes; None if the live state does not change before ``write`` has ended.
            later: Returns whether what is at a path of the state does not change before ``settle``, so that ``write``
                may copy it. None copies all at once.
            step_copies: Where to offer what is copied at once to exports of the same step.

        Raises:
            RankFailedError: on all ranks, if collecting or copying failed on any, the ranks disagree, the target
                exists, or a host has too little memory for the copies. The attempt is gone.
            RanksDisagreeError: on all ranks, naming the values under ``shared_keys`` that are different.
        """
        phase = f"collecting {self.target.name}"
        self._buffer, self._later, self._step_copies = buffer, later, step_copies
        answer = self._ranks.agree(phase, lambda: self._say(collect, shared_keys), self._decide)
        # The usual save ends with the round above: all ranks know what to write, and have copied it.
        if answer is None:  # not the same on all ranks; or not all of them have all
            refuse_different_values(self._ranks, phase, self._shared)
            answer = self._ranks.agree(phase, lambda: ["", *self._says[1:]], self._decide)
        is_staged, knows_hosts = answer["is_staged"], answer["knows_hosts"]
        is_dealt_anew = answer["attempt"] is None
        if is_dealt_anew:
            entries, speakers = self._held.entries, answer["speakers"]
            answer = self._ranks.deal(phase, lambda: self._share.report(entries, speakers), self._settle, large=True)
            with without_collection():
                self._share.accept(entries, answer["share"])
        self._attempt_id = answer["attempt"]
        self._own = self._share.own
        self._host = self._share.host if knows_hosts else None
        with self._abandoned_on_error():
            if self._folder is not None:
                self._ranks.gather(phase, self._make_on_this_host)
            if buffer is not None and not is_staged:
                self._stage_in_a_round(buffer, is_dealt_anew)
        if buffer is not None:
            self._held = Held(self._held.entries, [])  # the live tensors are needed no more

    def feed(self) -> None:
        """Copy what ``write`` is writing in another thread, as there is room. Main thread; no communication."""
        if self._staged is not None:
            self._staged[0].feed()

    def settle(self) -> None:
        """Return when all is copied, after which the live state may change. Main thread; no communication."""
        if self._staged is not None:
            self._staged[0].settle()

    def write(self) -> None:
        """Write this rank's file. Any thread; communicates through the store.

        Raises:
            RankFailedError: on all ranks, if writing failed on any. The attempt is gone.
        """
        phase, directory = f"writing {self.target.name}", attempt_directory(self.target, self._attempt_id)
        writes = WeightsWrite(self.contents.weights, self._ranks, directory, phase, self._host)
        with self._abandoned_on_error(), writes:
            writes.make(self._own.weights)
            self._share.host = writes.part
            self._receipts = self._ranks.gather(phase, lambda: self._write(writes), large=True)
            self._weight_records = writes.finish()

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
            with without_collection():  # else rank 0 gives no sign of life for seconds, again and again
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

    def _say(self, collect: Callable[[], Contents], shared_keys: Collection[str]) -> list[Any]:
        """Collect, and copy if this rank knows what it writes: where all do, the training waits for one round only."""
        with without_collection():
            is_known, description = self._collect(collect, shared_keys)
            is_staged = is_known and self._buffer is not None and self._has_staged(self._buffer)
        host = self._share.host
        knows_host = is_known and host is not None and host.is_of(self.contents.weights)
        self._says = [signature(self._shared), facts_of(self.contents), [is_known, description], is_staged, knows_host]
        return self._says

    def _collect(self, collect: Callable[[], Contents], shared_keys: Collection[str]) -> tuple[bool, str]:
        self.contents = collect()
        self._shared = shared_values(self.contents.state_dict, shared_keys)
        self._shared |= shared_values({OPTIONS: self.contents.options}, [OPTIONS])
        self._held = self._share.known.hold(self.contents.state_dict)
        return self._share.vote(self._held.entries, self.contents.weights.placed)

    def _decide(self, said: Sequence[Any]) -> Any:
        """Rank 0: the attempt, if everybody knows what to write; else who is to describe what there is.

        None if shared values are to be compared one by one before that.
        """
        signatures, facts, votes, staged, know_hosts = zip(*said, strict=True)
        if not are_equal(signatures):
            return None
        # Kept for ``_settle``, which reports them together with tensors that differ.
        self._problems = different_facts(facts)
        if not self._problems and all(is_known for is_known, _ in votes):
            return {"attempt": self._make_directory(), "is_staged": all(staged), "knows_hosts": all(know_hosts)}
        return {"attempt": None, "is_staged": False, "knows_hosts": False, "speakers": speakers_of(votes)}

    def _settle(self, reports: Sequence[Any]) -> list[dict[str, Any]]:
        """Rank 0: what each rank is to know."""
        with without_collection():  # of boxes there are ranks times tensors
            shares = self._share.settle(reports, self._problems)
        attempt = self._make_directory()  # after everything that can be refused: nothing is left to be removed then
        return [{"attempt": attempt, "share": share} for share in shares]

    def _make_directory(self) -> str:
        self._attempt = begin_attempt(self.target)
        return self._attempt.id

    def _has_staged(self, buffer: StagingBuffer) -> bool:
        """Copy without a word to the others; whether that was possible. What failed fails again in the round of all."""
        if not buffer.has_room:
            return False
        self._own = self._share.own
        try:
            self._stage(buffer)
        except Exception:
            log.debug("will be copied again", exc_info=True)
            return False
        return True

    def _stage_in_a_round(self, buffer: StagingBuffer, is_dealt_anew: bool) -> None:
        phase = f"staging {self.target.name}"
        # Counting memory costs a round of all ranks: only where the copy may need more than the last one did.
        if is_dealt_anew or not buffer.has_room:
            buffer.require_room(self._ranks, phase, self._tensors_and_dtypes)
        self._ranks.gather(phase, lambda: self._stage(buffer))

    def _stage(self, buffer: StagingBuffer) -> None:
        with without_collection():
            copy = StagedCopy(*self._tensors_and_dtypes(), buffer)
            copy.begin(self._owner if self._later is not None else None, self._step_copies)
            self._staged = copy, self._objects()

    def _owner(self, number: int) -> tuple[str, Tensor] | None:
        """Of a tensor that may be copied later."""
        i = self._own.tensors[number][0]
        entry = self._held.entries[i]
        is_later = self._later is not None and self._later(entry.path)
        return (entry.key, self._held.leaves[i]) if is_later else None

    def _tensors(self) -> list[Tensor]:
        return self._held.tensors(self._own.tensors, self._own.sizes)

    def _tensors_and_dtypes(self) -> tuple[list[Tensor], list[torch.dtype]]:
        tensors = self._tensors()
        return tensors, [tensor.dtype for tensor in tensors]

    def _objects(self) -> list[bytes]:
        values = [self._held.leaves[i] for i in self._own.objects]
        encoded = {key: encode(value) for key, value in dict(zip(map(id, values), values, strict=True)).items()}
        return [encoded[id(value)] for value in values]  # of an optimizer's groups most are the same objects

    def _write(self, writes: WeightsWrite) -> dict[str, Any]:
        directory = attempt_directory(self.target, self._attempt_id)
        copy, objects = self._staged or (None, self._objects())
        with contextlib.nullcontext(iter([self._tensors()])) if copy is None else copy.taken() as lists:
            values = chain.from_iterable(lists)
            weights = writes.write(self._own.weights, values)
            receipt = to_receipt(write_rank_file(self._own.file, values, objects, directory), weights.pieces)
        return {**receipt, "stored": self.contents.weights.pack(weights.stored), "tied": self.contents.tied}

    def _complete_weights(self, measured: Measured) -> dict[str, WeightsRecord] | None:
        """Rank 0: make the directories of the weights complete; what metadata.json says of them."""
        assert self._attempt is not None
        weights = self.contents.weights
        if not weights.directories:
            return None
        # A tied tensor has the digest of the one that was written.
        measured.digests.update({alias: measured.digests[kept] for alias, kept in weights.tied.items()})
        stored = weights.add_up([receipt["stored"] for receipt in self._receipts])
        measured.files.update(weights.complete(self._attempt.directory, stored, self._weight_records))
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
        indexes = whole.indexes(self._receipts, self._attempt_id)
        if self._folder is not None:
            # Other hosts are told them, which takes all of each.
            indexes = {name: as_bytes(content) for name, content in indexes.items()}
        beside = {**indexes, **self.contents.files, **extra}
        measured.files.update({name: write_content(self._attempt, name, one) for name, one in beside.items()})
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
        manifest = beside[layout.METADATA_FILE] = metadata.to_json()
        sizes[layout.METADATA_FILE] = self._attempt.write(layout.METADATA_FILE, manifest)
        written_by = {name: rank for rank, name in enumerate(whole.file_names)}
        self._attempt.commit(self._on_this_host(sizes, written_by))
        if self._folder is None:
            return None
        # Told through the store, as text; level 1 is quick, and an index compresses well.
        told = {name: as_bytes(content) for name, content in beside.items()}
        packed = {name: base64.b64encode(zlib.compress(content, 1)).decode() for name, content in told.items()}
        return {"files": packed, "sizes": sizes, "ranks": written_by}
