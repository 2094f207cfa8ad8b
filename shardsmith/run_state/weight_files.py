"""The weights of a save that go to Hugging Face files: a directory for the model, one for the average.

Every rank writes its boxes to their places in the final files, whose names, headers and sizes are known before. Names
and layout are those of the model's library; the bytes are those that training holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor

from shardsmith.formats.dcp.rank_file import Piece, moved
from shardsmith.formats.rounded_files import Exceptions, exceptions_file
from shardsmith.formats.safetensors_files.host_files import HostFiles
from shardsmith.formats.safetensors_files.plan import FilePlan, plan_files
from shardsmith.formats.safetensors_files.writer import SafetensorsFileWriter
from shardsmith.ground import layout
from shardsmith.ground.commit import writing
from shardsmith.ground.memory import memory_of
from shardsmith.hf.completion import complete_directory
from shardsmith.hf.directory import DirectoryPlan, ModelPlan
from shardsmith.hf.directory_check import check_directory
from shardsmith.manifest.checkpoints import hash_file
from shardsmith.manifest.metadata import FileRecord
from shardsmith.manifest.weights import WeightsRecord
from shardsmith.name_maps.maps import Translation
from shardsmith.name_maps.recorded import slices_to_plain
from shardsmith.name_maps.slices import Slice, Target
from shardsmith.sharding.shares import add_up_shares, pack_shares
from shardsmith.tensors.digest import Digest, digest_box, digest_run, first_of_run
from shardsmith.tensors.rounded import round_off
from shardsmith.tensors.tensors import Chunk, Shape, TensorSpec, row_major_blocks

_ROUNDED_ELEMENTS = 1 << 20
"""Of a tensor that is rounded at a time."""


class Placed(NamedTuple):
    """Keys of a state dict that are in weight files."""

    written: frozenset[str] = frozenset()
    tied: frozenset[str] = frozenset()
    """Names of tensors that are written under another one."""


@dataclass(frozen=True, slots=True)
class WeightsDirectory:
    """One model on its way into a Hugging Face directory within a checkpoint."""

    folder: str
    """Its name in the checkpoint; ``""`` for the checkpoint's directory itself."""
    plan: DirectoryPlan
    """Of one model."""
    translation: Translation | None
    """From the model's names to those of the files; None where they are the same."""
    names: dict[str, str]
    """Key in the state dict -> name that ``translation`` takes."""
    plain: frozenset[str]
    """Of these names, those of tensors that are in the files as they are in memory."""
    rest: tuple[FilePlan, ...] = ()
    """Files of what the others lack to what trains, of those tensors that are rounded; see ``tensors.rounded``."""

    @classmethod
    def of(
        cls,
        folder: str,
        plan: DirectoryPlan,
        translation: Translation | None,
        names: dict[str, str],
        dtypes: Mapping[str, torch.dtype],
    ) -> Self:
        """``plain`` and ``rest`` are found out. ``dtypes``: of the tensors in memory, by the model's names."""
        specs = {spec.name: spec for spec in plan.models[0].specs}
        targets = {} if translation is None else translation.targets
        plain = (
            name
            for name in names.values()
            if (translation is None or (name in specs and targets[name] == Slice.whole(specs[name])))
            and specs[name].dtype == dtypes[name]
        )
        rounded = [
            # int16: what the bfloat16 in the file lacks to the float32 in memory.
            TensorSpec(name, spec.shape, torch.int16)
            for name, spec in specs.items()
            if spec.dtype == torch.bfloat16
            and all(dtypes[source] == torch.float32 for source in (targets[name].sources if targets else (name,)))
        ]
        rest = plan_files(rounded, plan.models[0].stem).files if rounded else ()
        return cls(folder, plan, translation, names, frozenset(plain), rest)

    @property
    def model(self) -> ModelPlan:
        """The plan of its model."""
        return self.plan.models[0]

    @property
    def stored_names(self) -> list[str]:
        """Names of the tensors in its files."""
        return [spec.name for spec in self.model.specs]

    def place(self, checkpoint: Path) -> Path:
        """Return the directory in that of a checkpoint."""
        return checkpoint / self.folder if self.folder else checkpoint

    def files(self) -> Iterator[tuple[Path, FilePlan]]:
        """Yield the folder, in that of a checkpoint, and the plan of each file."""
        place = self.place(Path())
        yield from ((place, file) for file in self.model.weights.files)
        yield from ((place / layout.REST_FOLDER, file) for file in self.rest)

    def record(self, specs: Mapping[str, TensorSpec]) -> WeightsRecord:
        """Return what metadata.json says of it. ``specs``: by the model's own names."""
        own = {name: _fqn(key) for key, name in self.names.items()}
        targets: dict[str, Target] = {name: Slice.whole(specs[fqn]) for name, fqn in own.items()}
        if self.translation is not None:
            targets = {n: t.of(own) for n, t in self.translation.targets.items() if own.keys() >= set(t.sources)}
        return WeightsRecord(
            folder=self.folder, stem=self.model.stem, slices=slices_to_plain(targets, specs), rest=bool(self.rest)
        )


@dataclass(slots=True)
class Written:
    """What one rank finds out by writing its pieces."""

    pieces: list[Digest] = field(default_factory=list)
    """Its part in the digest of the tensor in memory, by piece."""
    stored: dict[str, dict[str, Digest]] = field(default_factory=dict)
    """Its part in the digests of the tensors in the files, by folder and name."""


class WeightFiles:
    """The weight files of one save. Every rank has the same."""

    def __init__(self, directories: Sequence[WeightsDirectory], tied: Mapping[str, str]) -> None:
        """``tied``: keys of tensors that are others, alias -> kept."""
        self.directories = tuple(directories)
        written = frozenset(key for directory in directories for key in directory.names)
        self.tied = {alias: kept for alias, kept in tied.items() if kept in written and alias not in written}
        self.placed = Placed(written, frozenset(self.tied))
        placed = [item for directory in self.directories for item in directory.files()]
        self.files = tuple(replace(file, name=str(folder / file.name)) for folder, file in placed)
        self._numbers = {(folder, name): i for i, (folder, file) in enumerate(placed) for name in file.tensors}

    def numbers_of(self, pieces: Iterable[Piece]) -> set[int]:
        """Return the numbers of the files that these pieces go to."""
        found: set[int | None] = set()
        for piece in pieces:
            for directory in self.directories:
                if (name := directory.names.get(piece.key)) is None:
                    continue
                place, targets = directory.place(Path()), {name}
                if directory.translation is not None:
                    targets = {link.name for link in directory.translation.links_from(name, piece.box)}
                for folder in (place, place / layout.REST_FOLDER):
                    found |= {self._numbers.get((folder, target)) for target in targets}
        return {number for number in found if number is not None}

    def write(
        self, pieces: Sequence[Piece], values: Iterator[Tensor], opened: HostFiles, checkpoint: Path, rank: int
    ) -> Written:
        """Write this rank's pieces. Any thread; no communication. What is ``opened`` is not durable afterwards.

        Args:
            pieces: What they are.
            values: Gives those of each piece first, on any device, and then what is not for these files.
            opened: These files in the directory of the attempt, by their place in ``files``.
            checkpoint: That directory.
            rank: Of this process.

        Raises:
            WriteError: it could not be written.
        """
        found = Written(stored={directory.folder: {} for directory in self.directories})
        writers = _Writers(opened, self._numbers)
        for piece in pieces:
            # What is written are bytes, in which a pending conjugation or negation would not be.
            held = next(values).detach().resolve_conj().resolve_neg().cpu()
            found.pieces.append(self._write_piece(writers, piece, held, found.stored))
        for folder, exceptions in writers.exceptions.items():
            exceptions.write(checkpoint / folder, rank)
        return found

    def _write_piece(
        self, writers: _Writers, piece: Piece, held: Tensor, stored: Mapping[str, dict[str, Digest]]
    ) -> Digest:
        digest: Digest | None = None
        for directory in self.directories:
            name = directory.names.get(piece.key)
            if name is None:
                continue
            found = stored[directory.folder]
            if name in directory.plain:
                digest = writers.write_whole(directory, name, piece, held)
                found[name] = found.get(name, Digest()) + digest
                continue
            for target, share in writers.write_parts(directory, name, piece, held):
                found[target] = found.get(target, Digest()) + share
        # No file has it as it is in memory, so its digest is taken apart.
        return digest if digest is not None else digest_box(held, piece.box, piece.shape)

    def hash_files(self, checkpoint: Path, part: int, parts: int) -> dict[str, FileRecord]:
        """Return records of a share of the weight files, when all ranks have written. Raises WriteError.

        ``part`` is this rank, ``parts`` the number of ranks.
        """
        names = [file.name for file in self.files]
        own = [str(d.place(Path()) / layout.REST_FOLDER / exceptions_file(part)) for d in self.directories]
        # Every n-th file; and the file of its own exceptions, which no other rank has written.
        mine = [*names[part::parts], *(name for name in own if (checkpoint / name).is_file())]
        return {name: _record(checkpoint, name) for name in mine}

    def pack(self, stored: Mapping[str, Mapping[str, Digest]]) -> dict[str, str]:
        """Return what ``Written.stored`` is on this rank as values that survive JSON."""
        return {
            directory.folder: pack_shares(stored[directory.folder], directory.stored_names)
            for directory in self.directories
        }

    def add_up(self, parts: Sequence[Mapping[str, str]]) -> dict[str, dict[str, Digest]]:
        """Return the digests of the tensors in the files from what ``pack`` gave on each rank."""
        return {
            directory.folder: add_up_shares((part[directory.folder] for part in parts), directory.stored_names)
            for directory in self.directories
        }

    def complete(
        self, checkpoint: Path, digests: Mapping[str, Mapping[str, Digest]], weights: Mapping[str, FileRecord]
    ) -> dict[str, FileRecord]:
        """Write what makes the directories complete, and check them. Rank 0; records of all their files.

        Args:
            checkpoint: The directory of the attempt.
            digests: By folder and name, of the tensors in the files.
            weights: Records of the weight files.

        Raises:
            MismatchError, CorruptCheckpointError: a directory is not what the class that its config names expects.
            WriteError: a write failed.
        """
        records = dict(weights)
        for directory in self.directories:
            place = directory.place(checkpoint)
            sizes = complete_directory(directory.plan, place, {directory.model.model: digests[directory.folder]})
            check_directory(directory.plan, place)
            # The weight files were hashed by the ranks; these are the small ones beside them.
            names = (str(directory.place(Path()) / name) for name in sizes)
            records |= {name: _record(checkpoint, name) for name in names if name not in weights}
        return records

    def records(self, specs: Mapping[str, TensorSpec]) -> dict[str, WeightsRecord]:
        """Return what metadata.json says of them, by model. ``specs``: all tensors of the checkpoint, by key."""
        own = {_fqn(key): TensorSpec(_fqn(key), spec.shape, spec.dtype) for key, spec in specs.items()}
        return {directory.model.model: directory.record(own) for directory in self.directories}


class _Writers:
    """Writes what one rank has into the files.

    Attributes:
        exceptions: By folder.
    """

    def __init__(self, opened: HostFiles, numbers: Mapping[tuple[Path, str], int]) -> None:
        """``numbers``: of the file that has a tensor, by the folder in the checkpoint and the name."""
        self._opened = opened
        self._numbers = numbers
        self.exceptions: dict[Path, Exceptions] = {}

    def write_whole(self, directory: WeightsDirectory, name: str, piece: Piece, held: Tensor) -> Digest:
        """Write a piece of a tensor that is in the file as it is in memory; its share in the digest."""
        writer = self._writer(directory.place(Path()), name)
        first = first_of_run(piece.box, piece.shape)
        # It is not one run of bytes in the file.
        if first is None or not piece.box.numel:
            writer.write_box(name, piece.box, held)
            return digest_box(held, piece.box, piece.shape)
        values = held.contiguous()
        memory, at = memory_of(values), first * values.element_size()
        # Each block is written while its digest is taken: it is in the cache then.
        return digest_run(values, first, lambda begin, end: writer.write_bytes(name, at + begin, memory[begin:end]))

    def write_parts(
        self, directory: WeightsDirectory, name: str, piece: Piece, held: Tensor
    ) -> Iterator[tuple[str, Digest]]:
        """Write what a piece is in the files; each tensor there with the share in its digest."""
        translation, place = directory.translation, directory.place(Path())
        if translation is None:
            yield name, self._write_box(place, name, piece.box, held, piece.shape)
            return
        for target, box, values in translation.to_targets(name, piece.box, held):
            yield target, self._write_box(place, target, box, values, translation.shapes[target])

    def _write_box(self, place: Path, name: str, box: Chunk, values: Tensor, shape: Shape) -> Digest:
        # A file for what is missing to it says that it is rounded.
        if (place / layout.REST_FOLDER, name) in self._numbers:
            return self._write_rounded(place, name, box, values, shape)
        writer = self._writer(place, name)
        stored = values.to(writer.plan.tensors[name].spec.dtype)
        writer.write_box(name, box, stored, shape)
        return digest_box(stored, box, shape)

    def _write_rounded(self, place: Path, name: str, box: Chunk, values: Tensor, shape: Shape) -> Digest:
        """Write both parts, block by block, since they take memory; the share in the digest of the bfloat16 one."""
        folder = place / layout.REST_FOLDER
        exceptions = self.exceptions.setdefault(folder, Exceptions())
        digest = Digest()
        for _, inner in row_major_blocks(box.sizes, _ROUNDED_ELEMENTS):
            block, parts = moved(inner, box), round_off(values[inner.within(Chunk.whole(box.sizes))])
            self._writer(place, name).write_box(name, block, parts.values, shape)
            self._writer(folder, name).write_box(name, block, parts.rest, shape)
            exceptions.add(name, block, shape, parts)
            digest += digest_box(parts.values, block, shape)
        return digest

    def _writer(self, folder: Path, name: str) -> SafetensorsFileWriter:
        return self._opened.to_write(self._numbers[folder, name])


def _fqn(key: str) -> str:
    """The model's own name of a tensor of model or average."""
    return key.removeprefix("ema_model.")


def _record(checkpoint: Path, name: str) -> FileRecord:
    with writing(checkpoint / name, "hashing it"):
        return FileRecord(size=(checkpoint / name).stat().st_size, xxh3_128=hash_file(checkpoint / name))
