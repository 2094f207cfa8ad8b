"""One writer for each file: the boxes of a tensor travel to the rank that writes the file it belongs to.

The ranks go through the files in rounds. In a round, each rank that has files to write takes the next tensor of them:
the others send it their boxes, straight from staged memory, and it receives and writes one at a time. So the most that
a rank needs besides is one box. The plan alone says who writes what, and in which order.

A rank that fails goes on to send and to receive, into nowhere, so that no other one waits for it in vain; it raises in
the end. One that died is noticed by those that it was to talk to; they go on with the others.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from shardsmith.errors import CorruptCheckpointError, UsageError
from shardsmith.export.digest_shares import add_up, encode
from shardsmith.export.live_writers import Digests, SliceWriter, Staged, WeightsWriter, shares
from shardsmith.export.peers import Peers
from shardsmith.export.place import create_file, deal_files
from shardsmith.formats.safetensors_files.plan import FilePlan
from shardsmith.formats.safetensors_files.source import SafetensorsSource
from shardsmith.formats.safetensors_files.upload import SafetensorsUpload
from shardsmith.formats.safetensors_files.writer import SafetensorsFileWriter
from shardsmith.ground.object_store import PART_BYTES
from shardsmith.ground.ranks import Ranks
from shardsmith.ground.remote_path import RemotePath
from shardsmith.hf.directory import DirectoryPlan
from shardsmith.sharding.live_boxes import LiveBox
from shardsmith.tensors.digest import Digest, digest_run
from shardsmith.tensors.tensors import Chunk, Shape, row_major_blocks

_READ_BYTES = 2 << 20

Key = tuple[str, str]
"""Model and name of a tensor."""
Coming = tuple[Shape, Chunk]
"""A ``LiveBox`` whose values another rank has."""


def choose_writer(write_mode: str, ranks: Ranks) -> WeightsWriter:
    """Return the writer that a user names. All ranks; makes a process group if files are written by one rank each.

    Raises:
        UsageError: there is no such mode.
    """
    if write_mode not in ("slices", "files"):
        raise UsageError(f'write_mode="{write_mode}": it is "slices" or "files"')
    if write_mode == "slices":
        return SliceWriter()
    # Gloo, and a group of its own: the exchange runs in a background thread, beside the training's collectives.
    timeout = timedelta(seconds=ranks.timeout_secs)
    group = dist.new_group(backend="gloo", timeout=timeout) if ranks.size > 1 else None
    return FileWriter(group, ranks.rank, ranks.size)


class FileWriter(WeightsWriter):
    """Each file is made and written by one rank alone (a ``WeightsWriter``).

    The files are dealt out evenly, so that as many hosts write as there are files.
    """

    def __init__(self, process_group: dist.ProcessGroup | None, rank: int, size: int) -> None:
        """``process_group`` holds all ranks, is of Gloo, and used by nobody else; None with a single rank."""
        self._group = process_group
        self._rank = rank
        self._size = size
        self._found: Any = None

    def make_files(self, plan: DirectoryPlan, directory: Path) -> None:
        """Nothing: whoever writes a file makes it."""

    def write(self, plan: DirectoryPlan, staged: Staged, directory: Path) -> None:
        """Send what others write, write what is this rank's to write, and read that back."""
        owned = deal_files(plan, self._size)
        # Every rank takes part, also one that writes no file: it has boxes to send.
        _Delivery(Peers(self._group, self._rank, self._size), owned, staged, directory).run()
        found: Digests = {model.model: {} for model in plan.models}
        for model, file in owned[self._rank]:
            # Read back by who wrote it: on NFS another host may still see older pages.
            found[model].update(_digests_of(directory / file.name))
        self._found = {"staged": encode(plan.models, shares(plan, staged)), "found": encode(plan.models, found)}

    def read_back(self) -> Any:
        """Return what ``write`` has sent and read back."""
        return self._found

    def merge(self, plan: DirectoryPlan, receipts: Sequence[Any], directory: Path) -> Digests:
        """Return what the files hold, which must be what was staged."""
        # What arrived is compared with what was sent: a box that was lost or mixed up on the way shows here.
        staged = add_up(plan, [receipt["staged"] for receipt in receipts])
        found = add_up(plan, [receipt["found"] for receipt in receipts])
        wrong = [name for model in found for name in found[model] if found[model][name] != staged[model][name]]
        if wrong:
            raise CorruptCheckpointError(directory, f"does not hold what was sent to be written: {', '.join(wrong)}")
        return found


@dataclass(frozen=True, slots=True)
class _Task:
    """A tensor that some rank is to write."""

    file: FilePlan
    key: Key


class _Delivery:
    """One pass over all files. What it does with another rank is done by both, in the same order."""

    def __init__(
        self, peers: Peers, owned: Sequence[Sequence[tuple[str, FilePlan]]], staged: Staged, directory: Path
    ) -> None:
        self._peers = peers
        self._files = [file for _, file in owned[peers.rank]]
        # In the order of the files, so that one file is open at a time and, in a store, uploaded front to back.
        self._tasks = [
            [_Task(file, (model, name)) for model, file in files for name in file.tensors] for files in owned
        ]
        self._staged: dict[Key, list[LiveBox]] = {}
        for model, boxes in staged.items():
            for box in boxes:
                self._staged.setdefault((model, box.name), []).append(box)
        self._directory = directory
        self._open: SafetensorsFileWriter | SafetensorsUpload | None = None
        self._unopened = [*self._files]
        self._error: Exception | None = None

    def run(self) -> None:
        """Deliver everything. Raises the first error that there was, in the end."""
        try:
            self._deliver()
        finally:
            if self._open is not None:
                self._open.close()
        for error in [self._error, *self._peers.lost.values()]:
            if error is not None:
                raise error

    def _deliver(self) -> None:
        # First who sends what: a rank must know the size of each tensor before it can receive it.
        coming = self._exchange_boxes()
        # Round i: each writer takes its i-th tensor; the shorter lists are filled up with None.
        for tasks in itertools.zip_longest(*self._tasks):
            for rank in self._peers.others:
                # All sends are begun before anything is received: else two writers could wait for each other.
                for box in self._boxes_for(tasks[rank]):
                    self._peers.send(box.written(), rank)
            if (task := tasks[self._peers.rank]) is not None:
                # One box at a time, the own ones first: at most one that was received is in memory.
                for box in itertools.chain(self._boxes_for(task), self._receive(task, coming)):
                    self._try(partial(self._write, task.file, box))
            # What is being sent must not change or be freed; and no rank runs a round ahead of those that it sends to.
            self._peers.flush()
        self._try(self._finish)

    def _exchange_boxes(self) -> dict[int, dict[Key, list[Coming]]]:
        """Say what this rank will send; hear what the others will, by rank."""
        for rank in self._peers.others:
            boxes = [(i, box) for i, task in enumerate(self._tasks[rank]) for box in self._boxes_for(task)]
            # Only a rank with tasks asks; what is sent and what is received must match in number and order.
            if self._tasks[rank]:
                self._peers.send_json([(i, box.shape, box.box.offsets, box.box.sizes) for i, box in boxes], rank)
        mine = self._tasks[self._peers.rank]
        coming: dict[int, dict[Key, list[Coming]]] = {rank: {} for rank in self._peers.others}
        # A rank that was lost says nothing; the others go on without its boxes, and it is reported in the end.
        for rank in self._peers.others if mine else ():
            for i, shape, offsets, sizes in self._peers.receive_json(rank) or ():
                box = Chunk(tuple(offsets), tuple(sizes))
                coming[rank].setdefault(mine[i].key, []).append((tuple(shape), box))
        self._peers.flush()
        return coming

    def _boxes_for(self, task: _Task | None) -> Sequence[LiveBox]:
        """What this rank has staged of a tensor."""
        return self._staged.get(task.key, ()) if task is not None else ()

    def _receive(self, task: _Task, coming: dict[int, dict[Key, list[Coming]]]) -> Iterator[LiveBox]:
        """What the others have of a tensor; each box is valid until the next."""
        name = task.key[1]
        dtype = task.file.tensors[name].spec.dtype
        for rank, boxes in coming.items():
            for shape, box in boxes.get(task.key, ()):
                values = torch.empty(box.sizes, dtype=dtype, device="cpu")
                # Also after an error of this rank: the sender waits until somebody has taken it.
                if self._peers.receive(values, rank):
                    yield LiveBox(name, shape, box, values)

    def _write(self, file: FilePlan, box: LiveBox) -> None:
        if self._open is None or self._open.plan is not file:
            self._open_next(file)
        assert self._open is not None
        self._open.write_box(box.name, box.box, box.written(), box.shape)

    def _open_next(self, file: FilePlan) -> None:
        # Durable before the next is begun: tensors come file by file.
        self._close()
        self._open = create_file(self._directory, file)
        self._unopened.remove(file)

    def _finish(self) -> None:
        """Make files, too, that nothing was written to: all their tensors are empty."""
        for file in [*self._unopened]:
            self._open_next(file)
        self._close()

    def _close(self) -> None:
        """Make the file durable that was written last."""
        if self._open is not None:
            with self._open as done:
                # First forget it: if ``sync`` fails, ``run`` must not close it a second time.
                self._open = None
                done.sync()

    def _try(self, act: Callable[[], None]) -> None:
        """Do it, unless something has failed before; an error is kept for the end."""
        if self._error is None:
            try:
                act()
            except Exception as error:
                self._error = error


def _digests_of(path: Path) -> dict[str, Digest]:
    """Of every tensor that a file holds. Raises CheckpointError."""
    nbytes = PART_BYTES if isinstance(path, RemotePath) else _READ_BYTES
    with contextlib.closing(SafetensorsSource(path)) as source:
        digests = {name: Digest() for name in source.specs}
        for name, spec in source.specs.items():
            for first, block in row_major_blocks(spec.shape, nbytes // spec.dtype.itemsize):
                for _, values in source.pieces(name, block):
                    digests[name] += digest_run(values, first)
        return digests
