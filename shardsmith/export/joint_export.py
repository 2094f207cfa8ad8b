"""One export of live, sharded weights to a Hugging Face directory. All ranks act together.

    begin    main thread    the ranks say what they hold; who writes which box is agreed, once for all exports (live)
    stage    main thread    every rank copies its boxes, cast, into CPU memory: all that the training waits for
    write    any thread     the boxes go to their final places in the final files, in one of the ways of live_writers
    commit   any thread     rank 0 adds what makes the directory complete, checks it, and renames it

No tensor is gathered, nothing is written twice, and nothing is consolidated afterwards: names, shapes and dtypes alone
say where every element lies in a safetensors file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from shardsmith.export.live_writers import WeightsWriter
from shardsmith.export.place import begin_export, fetch_weights, place_of_files
from shardsmith.ground.commit import Attempt, sweep
from shardsmith.ground.ranks import Ranks
from shardsmith.ground.remote_export import RemoteDirectory
from shardsmith.ground.syncs import cache_of, deal_syncs
from shardsmith.hf.completion import complete_directory
from shardsmith.hf.directory import DirectoryPlan, Measure
from shardsmith.hf.directory_check import check_directory
from shardsmith.sharding.live_boxes import LiveBox, StagingBuffer, address_of
from shardsmith.sharding.staged_copy import StagedCopy
from shardsmith.sharding.step_copies import Borrowed, StepCopies
from shardsmith.tensors.narrowing import LostValues, is_narrower
from shardsmith.tensors.tensors import TensorSpec, row_major_blocks

Check = Callable[[Path, set[torch.dtype]], str]
"""Looks at a complete directory before it is published: its path, and the dtypes that floating-point weights have in
it. On rank 0, in the background."""


class JointExport:
    """One directory that all ranks make. Make it on every rank; then, within a ``with``, ``write`` and ``commit``.

    What comes from live weights is staged before. Leaving the ``with`` before it is committed deletes what was written.

    Attributes:
        check: What the directory must pass, or None.
        measure: What it was compared with, on rank 0, once it is committed.
    """

    check: Check | None = None
    measure: Measure | None = None

    def __init__(self, plan: DirectoryPlan, ranks: Ranks, writer: WeightsWriter) -> None:
        """``ranks`` serves the thread that writes and commits."""
        self.plan = plan
        self._ranks = ranks
        self._staged: StagedCopy | None = None
        self._boxes: list[LiveBox] = []  # what it copies
        self._borrowed: Borrowed | None = None
        self._shared: list[LiveBox] = []  # with values that are borrowed
        self._attempt: Attempt | RemoteDirectory | None = None
        self._writer = writer
        self._receipts: list[list[Any]] = []  # of each rank, one a window
        self._own_receipts: list[Any] = []
        self._dtypes: dict[str, torch.dtype] = {}  # of what is written, by ``<model>/<tensor>``
        self._lost = LostValues()

    def stage(
        self,
        boxes: Mapping[str, Sequence[LiveBox]],
        buffer: StagingBuffer,
        ranks: Ranks,
        later: Mapping[int, tuple[str, Tensor]] | None = None,
        step_copies: StepCopies | None = None,
    ) -> None:
        """Copy this rank's boxes, cast, into the buffer. When it returns the weights may change, but for ``later``.

        What is borrowed is given back by ``write``, or by ``stop``.

        Args:
            boxes: By model, the live boxes that this rank writes.
            buffer: Memory to copy them into. If its bound is too small for them, they are left to ``feed``, which
                copies while ``write`` writes.
            ranks: Serves the main thread, which is the one that calls this.
            later: By address of their memory, names and tensors that do not change before ``settle``: ``write`` copies
                those.
            step_copies: What a save of the same step has copied. Boxes that are among it are not copied, but cast when
                they are written; not with ``later``, nor where the bound of the buffer is too small.

        Raises:
            RankFailedError: on all ranks, if copying failed on any, or a host has too little memory for the copies.
        """
        phase = f"staging {self.plan.output.name}"
        specs = {f"{model.model}/{spec.name}": spec for model in self.plan.models for spec in model.specs}
        flat = [replace(box, name=f"{model}/{box.name}") for model, held in boxes.items() for box in held]
        # For all boxes, also those that are borrowed now: the next export may have to copy them.
        if not buffer.has_room:
            buffer.require_room(ranks, phase, lambda: _values_and_dtypes(flat, specs))
        try:
            ranks.gather(phase, lambda: self._stage(flat, specs, buffer, later or {}, step_copies))
        except BaseException:
            self._give_back()
            raise

    def feed(self) -> None:
        """Copy what ``write`` is writing in another thread, as there is room. Main thread; no communication."""
        if self._staged is not None:
            self._staged.feed()

    def stop(self) -> None:
        """Let ``feed`` return, since nothing is written any more. Any thread; a second call does nothing."""
        if self._staged is not None:
            self._staged.stop()
        self._give_back()

    def settle(self) -> None:
        """Return when all is copied, after which the weights may change. Main thread; no communication."""
        if self._staged is not None:
            self._staged.settle()

    def write(self) -> None:
        """Write this rank's part of the weights. Any thread, all ranks; communicates.

        Raises:
            RankFailedError: on all ranks, if it failed on any. Nothing was published.
        """
        name = self.plan.output.name
        try:
            attempt = self._ranks.lead(f"making the files of {name}", self._make_files)
            directory = place_of_files(self.plan.output, attempt)
            self._writer.meet(self.plan, directory, self._ranks)
            files = self._ranks.deal(f"writing {name}", lambda: self._write(directory), deal_syncs, large=True)
            self._ranks.gather(f"making {name} durable", lambda: self._writer.sync(files))
            self._receipts = self._ranks.gather(f"reading {name} back", self._read_back, large=True)
        finally:
            self._writer.close()
            # Before the directory is completed and checked, which may take long: a save would copy it all for nothing.
            self._give_back()

    def commit(self) -> Path:
        """Complete the directory and make it visible. Any thread, all ranks; communicates through the store.

        Raises:
            RankFailedError: on all ranks, if rank 0 could not. Nothing was published.
        """
        self._ranks.lead(f"committing {self.plan.output.name}", self._commit)
        return self.plan.output

    def _stage(
        self,
        boxes: Sequence[LiveBox],
        specs: Mapping[str, TensorSpec],
        buffer: StagingBuffer,
        later: Mapping[int, tuple[str, Tensor]],
        step_copies: StepCopies | None,
    ) -> None:
        """The boxes and specs are named ``<model>/<tensor>``."""
        nbytes = sum(box.box.numel * _staged_dtype(box, specs).itemsize for box in boxes)
        if buffer.most_bytes is not None and nbytes > buffer.most_bytes:
            boxes = [*_pieces(self.plan, boxes, specs, buffer.most_bytes // 2)]
        elif step_copies is not None and not later:
            boxes = self._borrow(boxes, specs, step_copies)
        self._boxes = [*boxes]
        self._dtypes = {name: spec.dtype for name, spec in specs.items()}
        self._staged = StagedCopy(*_values_and_dtypes(boxes, specs), buffer)
        self._staged.begin(lambda number: later.get(address_of(boxes[number].values)))

    def _borrow(
        self, boxes: Sequence[LiveBox], specs: Mapping[str, TensorSpec], step_copies: StepCopies
    ) -> Sequence[LiveBox]:
        """Take what there are copies of; return the other boxes."""
        borrowed = self._borrowed = step_copies.borrow(*_values_and_dtypes(boxes, specs))
        pairs = [*zip(boxes, borrowed.copies, strict=True)]
        self._shared = [
            replace(box, values=copy, read=partial(borrowed.read, number))
            for number, (box, copy) in enumerate(pairs)
            if copy is not None
        ]
        return [box for box, copy in pairs if copy is None]

    def _narrowed(self, box: LiveBox) -> LiveBox:
        """The same; what was staged uncast is cast whenever it is written or compared."""
        dtype = self._dtypes[box.name]
        if not is_narrower(dtype, box.values.dtype):
            return box

        def read() -> Tensor:
            values = box.written()
            cast = values.to(dtype)
            self._lost.add(box.name, cast, lambda: values)
            return cast

        return replace(box, read=read)

    def _give_back(self) -> None:
        self._shared = []
        if self._borrowed is not None:
            self._borrowed.give_back()

    def _by_model(self, boxes: Iterable[LiveBox]) -> dict[str, list[LiveBox]]:
        staged: dict[str, list[LiveBox]] = {model.model: [] for model in self.plan.models}
        for box in boxes:
            model, name = box.name.split("/", 1)
            staged[model].append(replace(box, name=name))
        return staged

    def _write(self, directory: Path) -> tuple[str, list[int]]:
        """Write, and say which files this rank or another of its host is to make durable."""
        if self._staged is None:
            self._writer.write(self.plan, {}, directory)
        else:
            self._write_staged(self._staged, directory)
        self._lost.refuse(self.plan.output, "Nothing was published.")
        files = self._writer.unsynced()
        return cache_of(directory, self._ranks.rank) if files else "", files

    def _write_staged(self, staged: StagedCopy, directory: Path) -> None:
        boxes, self._boxes = iter(self._boxes), []
        with staged.taken() as lists:
            for copies in lists:
                pairs = zip(islice(boxes, len(copies)), copies, strict=True)
                # Without windows there is one list; with them nothing is borrowed.
                window = [*(replace(box, values=copy) for box, copy in pairs), *self._shared]
                self._writer.write(self.plan, self._by_model(map(self._narrowed, window)), directory)
                if not staged.is_whole:  # the values are gone after the window: so it is read back by itself
                    self._writer.sync(self._writer.unsynced())
                    self._own_receipts.append(self._writer.read_back())

    def _read_back(self) -> list[Any]:
        if self._staged is None or self._staged.is_whole:
            return [self._writer.read_back()]
        return self._own_receipts

    def _make_files(self) -> str:
        sweep(self.plan.output.parent)
        self._attempt = begin_export(self.plan, self.plan.nbytes)
        if isinstance(self._attempt, Attempt):
            self._writer.make_files(self.plan, self._attempt.directory)
        return self._attempt.id

    def _commit(self) -> None:
        assert self._attempt is not None
        directory = self._attempt.directory
        # First of all: what the files hold must be what was staged, whoever wrote it.
        digests = self._writer.merge(self.plan, [*chain.from_iterable(self._receipts)], directory)
        sizes = complete_directory(self.plan, directory, digests)
        self.measure = check_directory(self.plan, directory)
        if self.check is not None:
            # A store has the weights only; a check loads a directory of this machine.
            if isinstance(self._attempt, RemoteDirectory):
                fetch_weights(self.plan, self._attempt)
            self.measure = replace(self.measure, answers=self.check(directory, self.plan.dtypes))
        # Last: from here on others see it.
        self._attempt.commit(sizes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._attempt is not None:
            self._attempt.__exit__(*exc)


def _pieces(
    plan: DirectoryPlan, boxes: Sequence[LiveBox], specs: Mapping[str, TensorSpec], most_bytes: int
) -> Iterator[LiveBox]:
    """The boxes, named ``<model>/<tensor>``, in the order of the files, each cut into pieces of at most this size."""
    of_tensor: dict[str, list[LiveBox]] = {}
    for box in boxes:
        of_tensor.setdefault(box.name, []).append(box)
    names = (f"{model.model}/{name}" for model in plan.models for file in model.weights.files for name in file.tensors)
    for box in chain.from_iterable(of_tensor.get(name, ()) for name in names):
        most_elements = max(1, most_bytes // specs[box.name].dtype.itemsize)
        for _, part in row_major_blocks(box.box.sizes, most_elements):
            yield replace(box, box=part.moved(box.box.offsets), values=box.values[part.slices])


def _values_and_dtypes(
    boxes: Sequence[LiveBox], specs: Mapping[str, TensorSpec]
) -> tuple[list[Tensor], list[torch.dtype]]:
    return [box.values for box in boxes], [_staged_dtype(box, specs) for box in boxes]


def _staged_dtype(box: LiveBox, specs: Mapping[str, TensorSpec]) -> torch.dtype:
    """That of the file, but where it cannot hold all numbers of the other: whether it does is looked at in writing."""
    dtype, held = specs[box.name].dtype, box.values.dtype
    return held if is_narrower(dtype, held) else dtype
