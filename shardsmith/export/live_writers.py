"""How the staged boxes of all ranks get into the files: each rank writes its own slices, or one rank each file.

Slices of one file written by many hosts are right for local disks and parallel file systems. NFS and the like keep
whole pages of a file in each host's cache, and give no promise about two hosts that write the same one: there each
file is to be written by one rank alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from shardsmith.errors import CorruptCheckpointError
from shardsmith.export.digest_shares import add_up, encode
from shardsmith.formats.safetensors_files.host_files import HostFiles
from shardsmith.formats.safetensors_files.plan import FilePlan
from shardsmith.formats.safetensors_files.writer import SafetensorsFileWriter
from shardsmith.ground.memory import same_bits
from shardsmith.ground.ranks import Ranks
from shardsmith.hf.directory import DirectoryPlan, ModelPlan
from shardsmith.sharding.live_boxes import LiveBox
from shardsmith.tensors.digest import Digest, digest_box, digest_run, first_of_run
from shardsmith.tensors.tensors import row_major_blocks

_READ_BYTES = 1 << 20
"""Read back at once: with what it is compared with, it fits into a core's cache."""

Staged = Mapping[str, Sequence[LiveBox]]
"""By model, what this rank has staged. The boxes of all ranks cover each tensor exactly. Empty without live weights."""
Digests = dict[str, dict[str, Digest]]
"""By model and tensor: of the whole tensor, or what the boxes of one rank contribute."""


class WeightsWriter(Protocol):
    """A way to write the weight files of one directory. All ranks use the same."""

    def make_files(self, plan: DirectoryPlan, directory: Path) -> None:
        """What rank 0 does before any rank writes. No communication. Raises WriteError, and files may be open then."""
        ...

    def meet(self, plan: DirectoryPlan, directory: Path, ranks: Ranks) -> None:  # noqa: ARG002
        """Agree on what ranks do for each other, before they write. All ranks, with ``ranks`` of this thread.

        May communicate. Raises RankFailedError on all ranks, if it failed on any.
        """
        return

    def write(self, plan: DirectoryPlan, staged: Staged, directory: Path) -> None:
        """Write this rank's part, or a window of it. All ranks; may communicate.

        Raises:
            WriteError: a write failed.
            CorruptCheckpointError: a file does not hold what was written to it.
        """
        ...

    def unsynced(self) -> list[int]:
        """Return the numbers of files that this rank has written to, and that are not known to be durable.

        None, unless a writer leaves this to ``sync``.
        """
        return []

    def sync(self, files: Sequence[int]) -> None:  # noqa: ARG002
        """Make what all ranks of this host have written to these of ``unsynced`` durable. Raises WriteError."""
        return  # with no file unsynced there is nothing to do

    def read_back(self) -> Any:
        """Compare what was last written with what the files hold. What rank 0 must know of it, fit for JSON.

        Raises:
            CorruptCheckpointError: a file does not hold what was written to it.
        """
        ...

    def close(self) -> None:
        """Let go of files that are open, at the end or after an error."""
        return  # none are

    def merge(self, plan: DirectoryPlan, receipts: Sequence[Any], directory: Path) -> Digests:
        """On rank 0: the digests of whole tensors from what ``write`` returned on every rank.

        Raises:
            CorruptCheckpointError: a file does not hold what was staged.
        """
        ...


class SliceWriter(WeightsWriter):
    """Every rank writes its boxes to their final places in files that rank 0 has made.

    Each file is opened once, and stays open until one rank has made it durable for all of its host, and all have
    compared what it holds then. If there are many, one rank opens it for all of its host.
    """

    def __init__(self) -> None:
        self._files: HostFiles | None = None
        self._written: list[tuple[str, int, list[LiveBox]]] = []
        self._models: Sequence[ModelPlan] = ()

    def make_files(self, plan: DirectoryPlan, directory: Path) -> None:
        """Make every file, at its full size; it is durable when all that is written to it is."""
        # Rank 0 keeps them open; it writes to them as well.
        self._in(plan, directory).create()

    def meet(self, plan: DirectoryPlan, directory: Path, ranks: Ranks) -> None:
        """Share open files within each host, if there are many in all."""
        self._in(plan, directory).share(ranks)

    def write(self, plan: DirectoryPlan, staged: Staged, directory: Path) -> None:
        """Write this rank's boxes."""
        files = self._in(plan, directory)
        self._models, self._written = plan.models, []
        numbers = {(model, name): number for number, (model, file) in enumerate(_files(plan)) for name in file.tensors}
        by_file: dict[int, tuple[str, list[LiveBox]]] = {}
        for model, boxes in staged.items():
            for box in boxes:
                by_file.setdefault(numbers[model, box.name], (model, []))[1].append(box)
        for number, (model, mine) in sorted(by_file.items()):
            self._written.append((model, number, mine))
            writer = files.to_write(number)
            for box in mine:
                writer.write_box(box.name, box.box, box.written(), box.shape)

    def unsynced(self) -> list[int]:
        """Return the numbers of the files that are open, and were changed since they were last made durable."""
        return [] if self._files is None else self._files.unsynced()

    def sync(self, files: Sequence[int]) -> None:
        """Make these files durable."""
        # Of those that it has written to: ``deal_syncs`` gives each file to one of the ranks of a host.
        if self._files is not None:
            self._files.sync(files)

    def read_back(self) -> Any:
        """Compare this rank's boxes with what the files hold."""
        found: Digests = {model.model: {} for model in self._models}
        if self._files is not None:
            for model, number, mine in self._written:
                writer = self._files.to_read(number)
                _add_shares(found[model], ((box.name, _compare_and_digest(writer, box)) for box in mine))
        self._written = []
        return encode(self._models, found)

    def _in(self, plan: DirectoryPlan, directory: Path) -> HostFiles:
        if self._files is None:
            self._files = HostFiles(directory, [file for _, file in _files(plan)])
        return self._files

    def close(self) -> None:
        """Close all files."""
        self._written = []
        files, self._files = self._files, None
        if files is not None:
            files.close()

    def merge(self, plan: DirectoryPlan, receipts: Sequence[Any], directory: Path) -> Digests:  # noqa: ARG002
        """Return the sum of all shares; each rank has compared its own."""
        return add_up(plan, receipts)


def shares(plan: DirectoryPlan, staged: Staged) -> Digests:
    """Return what this rank's boxes contribute to the digests of their tensors."""
    found: Digests = {}
    for model in plan.models:
        digests = ((box.name, digest_box(box.written(), box.box, box.shape)) for box in staged[model.model])
        _add_shares(found.setdefault(model.model, {}), digests)
    return found


def _add_shares(digests: dict[str, Digest], shares: Iterable[tuple[str, Digest]]) -> None:
    for name, share in shares:
        digests[name] = digests.get(name, Digest()) + share


def _files(plan: DirectoryPlan) -> Iterator[tuple[str, FilePlan]]:
    """All weight files, each with its model. Ranks call them by their place in this order."""
    return ((model.model, file) for model in plan.models for file in model.weights.files)


def _compare_and_digest(writer: SafetensorsFileWriter, box: LiveBox) -> Digest:
    """Digest of what was staged, in the same pass in which it is compared with what the file holds, bit for bit.

    Raises:
        CorruptCheckpointError: that is something else.
        CheckpointError: it cannot be read.
    """
    stored, values = writer.stored(box.name, box.shape), box.written()

    def compare(found: Tensor, staged: Tensor) -> None:
        if not same_bits(found, staged):
            raise CorruptCheckpointError(writer.path, f"{box.name}: {box.box} does not hold what was written to it")

    # None: the box is no run of consecutive bytes, so it is compared block by block.
    first = first_of_run(box.box, box.shape)
    if first is None:
        for _, part in row_major_blocks(box.box.sizes, max(1, _READ_BYTES // values.element_size())):
            compare(stored[part.moved(box.box.offsets).slices], values[part.slices])
        return digest_box(values, box.box, box.shape)
    # In bytes: the box is one run in the file, read into a scratch buffer that stays in cache.
    begin_of_run, staged = first * values.element_size(), values.view(-1).view(torch.uint8)
    scratch = torch.empty(min(_READ_BYTES, staged.numel()), dtype=torch.uint8, device="cpu")

    def look(begin: int, end: int) -> None:
        for at in range(begin, end, _READ_BYTES):
            part = scratch[: min(_READ_BYTES, end - at)]
            stored.read_bytes(begin_of_run + at, part)
            compare(part, staged[at : at + part.numel()])

    # ``look`` is called for each stretch just before or after it is summed up, while it is in cache.
    return digest_run(values, first, look)
