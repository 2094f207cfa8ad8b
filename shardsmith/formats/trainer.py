"""A folder that a trainer wrote, with our directory in it: main weights from theirs, the average from ours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from shardsmith.errors import CheckpointError, CheckpointNotFoundError
from shardsmith.formats.dcp.source import DcpSource
from shardsmith.formats.detected import UNKNOWN, DetectedFormat, FormatReader
from shardsmith.formats.models import ModelSource
from shardsmith.ground import layout
from shardsmith.manifest.companion import companion_of, is_complete, read_folder_record
from shardsmith.manifest.metadata import read_metadata
from shardsmith.name_maps.restored import RestoredModel
from shardsmith.tensors.checkpoint_keys import EMA, MAIN
from shardsmith.tensors.tensors import Chunk, TensorSource, TensorSpec


class JoinedSource:
    """Tensors of several sources, each under a prefix of its own (a ``TensorSource``)."""

    def __init__(self, path: Path, sources: Mapping[str, TensorSource]) -> None:
        """``sources``: prefix, which no other one begins with -> source."""
        self.path = path
        self._sources = dict(sources)
        self.specs: Mapping[str, TensorSpec] = {
            prefix + name: TensorSpec(prefix + name, spec.shape, spec.dtype)
            for prefix, source in self._sources.items()
            for name, spec in source.specs.items()
        }

    def pieces(self, name: str, box: Chunk) -> Iterator[tuple[Chunk, Tensor]]:
        """As ``TensorSource.pieces``."""
        for prefix, source in self._sources.items():
            if name.startswith(prefix):
                return source.pieces(name.removeprefix(prefix), box)
        raise CheckpointNotFoundError(self.path, f"has no tensor named {name!r}")

    def close(self) -> None:
        """Close the files."""
        for source in self._sources.values():
            source.close()


def trainer_reader(readers: Sequence[FormatReader]) -> FormatReader:
    """Reads folders with our directory in them; what the trainer put there, one of ``readers`` knows."""

    def find(path: Path) -> tuple[DetectedFormat, FormatReader] | None:
        for reader in readers:
            if (found := reader.detect(path)) is not None:
                return found, reader
        return None

    def detect(path: Path) -> DetectedFormat | None:
        # Without our complete record the folder is the trainer's alone, and the other readers judge it.
        known = find(path) if is_complete(path) else None
        if known is None:
            return None
        try:
            about = read_metadata(companion_of(path))
        except CheckpointError as error:
            return DetectedFormat(UNKNOWN, str(error))
        average = "an average" if about.ema else "no average"
        reason = f"{known[0].reason}; {layout.COMPANION}/ of step {about.step}, {average}"
        return DetectedFormat(known[0].name, reason, about, known)

    def models(path: Path, found: DetectedFormat) -> list[str]:
        if found.inside is None or found.manifest is None:
            return []
        theirs, reader = found.inside
        return reader.models(path, theirs) if found.manifest.ema is None else [MAIN, EMA]

    def open_model(path: Path, model: str, found: DetectedFormat) -> ModelSource:
        assert found.inside is not None, "it was detected"
        theirs, reader = found.inside
        main = reader.open(path, MAIN, theirs)
        return main if model == MAIN or found.manifest is None else _open_average(path, main, found.manifest.tied)

    return FormatReader(detect, models, open_model)


def _open_average(path: Path, main: ModelSource, tied: Mapping[str, str]) -> ModelSource:
    """What the average does not cover (frozen weights, buffers) comes from the trainer's own files.

    ``main`` is closed with the average, or if that cannot be opened.
    """
    with contextlib.ExitStack() as opened:
        opened.callback(main.close)
        ours = DcpSource(companion_of(path))
        opened.callback(ours.close)
        averages = {
            key.removeprefix(layout.EMA_PREFIX): key for key in ours.index.tensors if key.startswith(layout.EMA_PREFIX)
        }
        if not averages:
            raise CheckpointNotFoundError(path, "has no average")
        theirs = _as_in_memory(path, main, averages, tied)
        # In the trainer's order; what only the average has comes last.
        names = dict.fromkeys([*theirs.specs, *averages])
        aliases = {alias: kept for alias, kept in tied.items() if kept in names}
        filled = frozenset(name for name in theirs.specs if name not in averages and name not in aliases)
        keys = {
            name: f"ours/{averages[name]}" if name in averages else f"theirs/{name}"
            for name in names
            if name not in aliases
        }
        # Prefixes keep names apart that both sources have.
        joined = JoinedSource(path, {"ours/": ours, "theirs/": theirs})
        average = ModelSource(joined, keys, filled=filled, aliases=aliases)
        opened.pop_all()
        return average


def _as_in_memory(
    path: Path, main: ModelSource, averages: Mapping[str, str], tied: Mapping[str, str]
) -> ModelSource | RestoredModel:
    """The trainer's weights under the names that the average has, which transformers may have changed in its files."""
    if averages.keys() <= main.specs.keys() | main.aliases.keys():
        return main
    from shardsmith.name_maps.transformers import TransformersNames

    record = read_folder_record(path).tensors
    specs = {name: tensor.spec(name) for name, tensor in record.items()}
    return RestoredModel(main, TransformersNames.of_directory(path), specs, tied)
