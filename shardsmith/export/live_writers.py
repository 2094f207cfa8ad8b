"""How the staged boxes of all ranks get into the files: each rank writes its own slices, or one rank each file.

Slices of one file written by many hosts are right for local disks and parallel file systems. NFS and the like keep
whole pages of a file in each host's cache, and give no promise about two hosts that write the same one: there each
file is to be written by one rank alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from shardsmith.errors import CorruptCheckpointError
from shardsmith.formats.safetensors_files.plan import FilePlan
from shardsmith.formats.safetensors_files.source import SafetensorsSource
from shardsmith.formats.safetensors_files.writer import SafetensorsFileWriter
from shardsmith.ground.memory import same_bits
from shardsmith.hf.directory import DirectoryPlan, ModelPlan
from shardsmith.sharding.live_boxes import LiveBox
from shardsmith.sharding.shares import add_up_ranks
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
        """What rank 0 does before any rank writes. No communication. Raises WriteError."""
        ...

    def write(self, plan: DirectoryPlan, staged: Staged, directory: Path) -> Any:
        """Write and fsync this rank's part. All ranks; may communicate. What rank 0 must know of it, fit for JSON.

        Raises:
            WriteError: a write failed.
            CorruptCheckpointError: a file does not hold what was written to it.
        """
        ...

    def merge(self, plan: DirectoryPlan, receipts: Sequence[Any], directory: Path) -> Digests:
        """On rank 0: the digests of whole tensors from what ``write`` returned on every rank.

        Raises:
            CorruptCheckpointError: a file does not hold what was staged.
        """
        ...


class SliceWriter:
    """Every rank writes its boxes to their final places in files that rank 0 has made. No communication."""

    def make_files(self, plan: DirectoryPlan, directory: Path) -> None:
        """Make every file, at its full size."""
        for model in plan.models:
            for file in model.weights.files:
                SafetensorsFileWriter.create(directory, file).close()

    def write(self, plan: DirectoryPlan, staged: Staged, directory: Path) -> Any:
        """Write this rank's boxes, and compare them with what the files hold then."""
        found: Digests = {model.model: {} for model in plan.models}
        for model in plan.models:
            for file in model.weights.files:
                if mine := [box for box in staged[model.model] if box.name in file.tensors]:
                    _add_shares(found[model.model], _write_slices(directory, file, mine))
        return encode(found)

    def merge(self, plan: DirectoryPlan, receipts: Sequence[Any], directory: Path) -> Digests:  # noqa: ARG002
        """Return the sum of all shares; each rank has compared its own."""
        return add_up(plan, receipts)


def shares(plan: DirectoryPlan, staged: Staged) -> Digests:
    """Return what this rank's boxes contribute to the digests of their tensors."""
    found: Digests = {}
    for model in plan.models:
        digests = ((box.name, digest_box(box.values, box.box, box.shape)) for box in staged[model.model])
        _add_shares(found.setdefault(model.model, {}), digests)
    return found


def _add_shares(digests: dict[str, Digest], shares: Iterable[tuple[str, Digest]]) -> None:
    for name, share in shares:
        digests[name] = digests.get(name, Digest()) + share


def encode(digests: Digests) -> dict[str, dict[str, str]]:
    """As text, for JSON. ``add_up`` reads it."""
    return {model: {name: str(digest) for name, digest in found.items()} for model, found in digests.items()}


def add_up(plan: DirectoryPlan, encoded: Sequence[Mapping[str, Mapping[str, str]]]) -> Digests:
    """Return the digests of whole tensors from every rank's shares."""

    def of_model(model: ModelPlan) -> dict[str, Digest]:
        parts = [found.get(model.model, {}) for found in encoded]
        return add_up_ranks(parts, [spec.name for spec in model.specs])

    return {model.model: of_model(model) for model in plan.models}


def _write_slices(directory: Path, file: FilePlan, boxes: Sequence[LiveBox]) -> list[tuple[str, Digest]]:
    """Write boxes to one file and look at what it holds then; what each contributes to the digest of its tensor."""
    with SafetensorsFileWriter.open_existing(directory, file) as writer:
        for box in boxes:
            writer.write_box(box.name, box.box, box.values, box.shape)
        writer.sync()
    with contextlib.closing(SafetensorsSource(directory / file.name)) as source:
        return [(box.name, _compare_and_digest(source, box)) for box in boxes]


def _compare_and_digest(source: SafetensorsSource, box: LiveBox) -> Digest:
    """Digest of what was staged, in the same pass in which it is compared with what the file holds, bit for bit.

    Raises:
        CorruptCheckpointError: that is something else.
        CheckpointError: it cannot be read.
    """
    stored = source.stored(box.name, box.shape)

    def compare(found: Tensor, staged: Tensor) -> None:
        if not same_bits(found, staged):
            raise CorruptCheckpointError(source.path, f"{box.name}: {box.box} does not hold what was written to it")

    first = first_of_run(box.box, box.shape)
    if first is None:
        for _, part in row_major_blocks(box.box.sizes, max(1, _READ_BYTES // box.values.element_size())):
            compare(stored[part.moved(box.box.offsets).slices], box.values[part.slices])
        return digest_box(box.values, box.box, box.shape)
    begin_of_run, staged = first * box.values.element_size(), box.values.view(-1).view(torch.uint8)
    scratch = torch.empty(min(_READ_BYTES, staged.numel()), dtype=torch.uint8, device="cpu")

    def look(begin: int, end: int) -> None:
        for at in range(begin, end, _READ_BYTES):
            part = scratch[: min(_READ_BYTES, end - at)]
            stored.read_bytes(begin_of_run + at, part)
            compare(part, staged[at : at + part.numel()])

    return digest_run(box.values, first, look)
