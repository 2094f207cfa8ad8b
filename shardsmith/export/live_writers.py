"""How the staged boxes of all ranks get into the files: each rank writes its own slices, or one rank each file.

Slices of one file written by many hosts are right for local disks and parallel file systems. NFS and the like keep
whole pages of a file in each host's cache, and give no promise about two hosts that write the same one: there each
file is to be written by one rank alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from shardsmith.digest import Digest, digest_box
from shardsmith.errors import CorruptCheckpointError
from shardsmith.export.directory import DirectoryPlan
from shardsmith.export.live_boxes import LiveBox
from shardsmith.memory import same_bits
from shardsmith.safetensors_files.plan import FilePlan
from shardsmith.safetensors_files.source import SafetensorsSource
from shardsmith.safetensors_files.writer import SafetensorsFileWriter
from shardsmith.tensors import Chunk

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
        for model in plan.models:
            for file in model.weights.files:
                if mine := [box for box in staged[model.model] if box.name in file.tensors]:
                    _write_slices(directory, file, mine)
        return encode(shares(plan, staged))

    def merge(self, plan: DirectoryPlan, receipts: Sequence[Any], directory: Path) -> Digests:  # noqa: ARG002
        """The sum of all shares; each rank has compared its own."""
        return add_up(plan, receipts)


def shares(plan: DirectoryPlan, staged: Staged) -> Digests:
    """What this rank's boxes contribute to the digests of their tensors."""
    found: Digests = {}
    for model in plan.models:
        digests = found.setdefault(model.model, {})
        for box in staged[model.model]:
            share = digest_box(box.values, box.box, box.shape)
            digests[box.name] = digests.get(box.name, Digest()) + share
    return found


def encode(digests: Digests) -> dict[str, dict[str, str]]:
    """As text, for JSON. ``add_up`` reads it."""
    return {model: {name: str(digest) for name, digest in found.items()} for model, found in digests.items()}


def add_up(plan: DirectoryPlan, encoded: Sequence[Mapping[str, Mapping[str, str]]]) -> Digests:
    """The digests of whole tensors from every rank's shares."""
    total = {model.model: {spec.name: Digest() for spec in model.specs} for model in plan.models}
    for receipt in encoded:
        for model, found in receipt.items():
            for name, share in found.items():
                total[model][name] += Digest.parse(share)
    return total


def _write_slices(directory: Path, file: FilePlan, boxes: Sequence[LiveBox]) -> None:
    with SafetensorsFileWriter.open_existing(directory, file) as writer:
        for box in boxes:
            writer.write_box(box.name, box.box, box.values, box.shape)
        writer.sync()
    _compare_with_file(directory / file.name, boxes)


def _compare_with_file(path: Path, boxes: Sequence[LiveBox]) -> None:
    """Raise CorruptCheckpointError unless the file holds what was staged, bit for bit."""
    source = SafetensorsSource(path)
    try:
        for box in boxes:
            ((_, whole),) = source.pieces(box.name, Chunk.whole(source.specs[box.name].shape))
            found = whole.view(box.shape)[box.box.within(Chunk.whole(box.shape))]
            if not same_bits(found, box.values):
                raise CorruptCheckpointError(path, f"{box.name}: {box.box} does not hold what was written to it")
    finally:
        source.close()
