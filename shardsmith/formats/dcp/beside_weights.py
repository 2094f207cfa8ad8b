"""A checkpoint whose weights are the files of Hugging Face directories, and whose rest is DCP: all of it by key.

    .metadata .boxes *.distcp  optimizer, scheduler, random numbers, what no Hugging Face file has a place for
    model*.safetensors         the model, under the names that its library gives the files
    ema/model*.safetensors     the average

metadata.json records which elements of which tensors the files hold, so that they are read under the keys, and in the
shapes, that a checkpoint of DCP files alone would have.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from shardsmith.errors import CheckpointError, CorruptCheckpointError, MismatchError, UsageError
from shardsmith.formats.dcp.box_index import BoxIndex, specs_of
from shardsmith.formats.dcp.index import DcpEntry, DcpIndex
from shardsmith.formats.dcp.source import DcpSource
from shardsmith.formats.rounded_files import RoundedSource
from shardsmith.formats.safetensors_files.source import open_safetensors_directory
from shardsmith.ground import layout
from shardsmith.ground.threads import useful_threads
from shardsmith.manifest.metadata import CheckpointMetadata, find_metadata
from shardsmith.manifest.weights import WeightsRecord
from shardsmith.name_maps.recorded import RecordedNames, RunNames, read_slices
from shardsmith.name_maps.restored import RestoredModel
from shardsmith.tensors.checkpoint_keys import EMA, MAIN
from shardsmith.tensors.narrowing import LostValues, is_narrower
from shardsmith.tensors.tensors import Chunk, TensorSource, TensorSpec, read_into

Box = tuple[str, Chunk, Tensor]
"""A key, a box of that tensor, and the CPU tensor of the box's shape to fill."""


class BesideWeights(DcpSource):
    """All tensors of such a checkpoint by key (a ``TensorSource``); objects are in the DCP part.

    Attributes:
        index: What the checkpoint holds. The tensors that are in Hugging Face files have no chunks in it.
    """

    def __init__(
        self, path: Path, metadata: CheckpointMetadata, *, follow_links: bool = False, to_load: bool = False
    ) -> None:
        """Open all files, and compare what they hold with what metadata.json says.

        Raises:
            CheckpointError: files are missing, damaged, or not those of this checkpoint.
        """
        super().__init__(path, follow_links=follow_links, to_load=to_load)
        self._models: dict[str, RestoredModel] = {}
        self._places: dict[str, tuple[str, str]] = {}  # key -> model, name in it
        # Entries of single ranks are always in the DCP part; to look each of them up would read a block per rank.
        shared = {key: record for key, record in metadata.tensors.items() if not self.index.is_of_rank(key)}
        own = {key: record.spec(key) for key, record in shared.items() if key not in self.index.tensors}
        # If a later file cannot be opened, the ones opened so far are closed; on success they stay open.
        with contextlib.ExitStack() as opened:
            opened.callback(self.close)
            for model, record in (metadata.weights or {}).items():
                # ``tied`` names keys of the main model only.
                self._open(model, record, own, metadata.tied if model == MAIN else {})
            if lost := [key for key in own if key not in self._places]:
                raise CorruptCheckpointError(self.path, f"no file holds {', '.join(lost[:5])}, which it lists")
            opened.pop_all()
        self._add(own, list(metadata.tensors))

    def pieces(self, name: str, box: Chunk) -> Iterator[tuple[Chunk, Tensor]]:
        """As ``TensorSource.pieces``."""
        if name not in self._places:
            yield from super().pieces(name, box)
            return
        model, own = self._places[name]
        yield from self._models[model].pieces(own, box)

    def is_elsewhere(self, name: str) -> bool:
        """Return whether a tensor is in a Hugging Face file."""
        return name in self._places

    def fill(self, boxes: Iterable[Box], lost: LostValues) -> None:
        """Fill boxes of tensors that are in Hugging Face files, several at a time. Raises CheckpointError.

        Args:
            boxes: What to fill.
            lost: Where to note finite values that are infinite in the dtype of the tensor to fill.
        """
        boxes = list(boxes)
        # Each thread reads boxes of its own: no two write to the same memory.
        threads = useful_threads(sum(out.nbytes for _, _, out in boxes), len(boxes)) or 1

        @torch.no_grad()
        def read(box: Box) -> None:
            key, place, out = box
            read_into(self, key, place, out)
            if is_narrower(out.dtype, held := self.specs[key].dtype):
                empty = partial(torch.empty, place.sizes, dtype=held, device="cpu")
                lost.add(key, out, lambda: read_into(self, key, place, empty()))

        with ThreadPoolExecutor(threads, "shardsmith-weights") as pool:
            for _ in pool.map(read, boxes):
                pass

    def close(self) -> None:
        """Close the files. Tensors that were read stay valid."""
        for model in self._models.values():
            model.close()
        super().close()

    def _open(self, model: str, record: WeightsRecord, own: Mapping[str, TensorSpec], tied: Mapping[str, str]) -> None:
        prefix = layout.EMA_PREFIX if model == EMA else ""
        keys = {key.removeprefix(prefix): key for key in own if key.startswith(layout.EMA_PREFIX) == (model == EMA)}
        # A tied pair of which one name lies in the DCP part is no alias within the files.
        aliases = {alias: kept for alias, kept in tied.items() if alias in keys and kept in keys}
        specs = {
            name: TensorSpec(name, own[key].shape, own[key].dtype) for name, key in keys.items() if name not in aliases
        }
        files = _open_files(self.path, record)
        try:
            names = RecordedNames(read_slices(record.slices), files.specs)
            restored = RestoredModel(files, names, specs, aliases)
            _compare_dtypes(restored, specs)
        except (KeyError, TypeError, ValueError, UsageError, MismatchError) as error:
            files.close()
            reason = f"does not say how its weights are made of its files: {type(error).__name__}: {error}"
            raise CorruptCheckpointError(self.path / layout.METADATA_FILE, reason) from error
        self._models[model] = restored
        self._places |= {key: (model, name) for name, key in keys.items()}

    def _add(self, own: Mapping[str, TensorSpec], order: list[str]) -> None:
        """Take the tensors of the files into the index, in the order of metadata.json if that is read as a whole."""
        # A load by .boxes keeps looking entries up one by one, so their order is not known and does not matter.
        if isinstance(self.index, BoxIndex):
            self.index = self.index.beside({key: DcpEntry(spec, ()) for key, spec in own.items()})
            self.specs = specs_of(self.index)
            return
        entries = {key: self.index.tensors.get(key) or DcpEntry(own[key], ()) for key in order}
        containers = {key: (key,) if key in own else self.index.containers[key] for key in order}
        rest = {key: path for key, path in self.index.containers.items() if key not in containers}
        self.index = replace(self.index, tensors=entries, containers={**containers, **rest})
        self.specs = {name: entry.spec for name, entry in entries.items()}


def open_step(
    path: Path, metadata: CheckpointMetadata | None = None, *, follow_links: bool = False, to_load: bool = False
) -> DcpSource:
    """Open a directory with an index of DCP, wherever its weights are. Raises CheckpointError.

    Args:
        path: The directory.
        metadata: Its metadata.json, if that was read already.
        follow_links: As ``DcpSource`` takes it.
        to_load: As ``DcpSource`` takes it.
    """
    if metadata is None and (path / layout.METADATA_FILE).exists():
        metadata = _metadata_of(path)
    if metadata is None or metadata.weights is None:
        return DcpSource(path, follow_links=follow_links, to_load=to_load)
    return BesideWeights(path, metadata, follow_links=follow_links, to_load=to_load)


def recorded_names(path: Path, metadata: CheckpointMetadata) -> RunNames | None:
    """Return how Hugging Face files are made of a checkpoint's weights, as it records it; None if it does not.

    Raises CheckpointError.
    """
    record = (metadata.weights or {}).get(MAIN)
    if metadata.names is None and record is None:
        return None
    try:
        if record is None:
            return RunNames(read_slices(metadata.names or {}), {})
        with contextlib.closing(_open_files(path, record)) as files:
            return RunNames(read_slices(record.slices), files.specs)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"does not say how files are made of its weights: {type(error).__name__}: {error}"
        raise CorruptCheckpointError(path / layout.METADATA_FILE, reason) from error


def _open_files(path: Path, record: WeightsRecord) -> TensorSource:
    folder = path / record.folder
    return RoundedSource(folder, record.stem) if record.rest else open_safetensors_directory(folder, record.stem)


def index_of(path: Path) -> DcpIndex:
    """Return what a directory with an index of DCP holds, wherever its weights are. Raises CheckpointError."""
    with contextlib.closing(open_step(path)) as source:
        return source.index


def _metadata_of(path: Path) -> CheckpointMetadata | None:
    """None, too, where it cannot be read: then a DCP directory is what its own index says."""
    try:
        return find_metadata(path)
    except CheckpointError:
        return None


def _compare_dtypes(restored: RestoredModel, specs: Mapping[str, TensorSpec]) -> None:
    """Raises ValueError."""
    if wrong := [name for name, spec in specs.items() if restored.specs[name].dtype != spec.dtype]:
        raise ValueError(f"{wrong[0]} is {restored.specs[wrong[0]].dtype} in the files, {specs[wrong[0]].dtype} here")
