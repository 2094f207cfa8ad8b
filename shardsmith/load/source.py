"""What an initial load reads from: tensors under the names of the model, and what is recorded about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from shardsmith.errors import CheckpointError, CheckpointNotFoundError, MismatchError, UnsupportedFormatError
from shardsmith.formats.by_path import HUGGINGFACE, SHARDED, known_checkpoint
from shardsmith.formats.matched import renamed
from shardsmith.formats.models import ModelSource
from shardsmith.formats.safetensors_files.source import open_safetensors_directory
from shardsmith.load.live_weights import LiveWeights
from shardsmith.manifest.initial import InitialRecord
from shardsmith.manifest.metadata import CheckpointMetadata, read_metadata
from shardsmith.manifest.weights import WeightsRecord
from shardsmith.name_maps.class_names import ClassNames
from shardsmith.name_maps.maps import LeavesOut, MakesBuffers, NameMap
from shardsmith.name_maps.matching import match_names
from shardsmith.name_maps.restored import RestoredModel
from shardsmith.name_maps.transformers import TransformersNames
from shardsmith.tensors.digest import Digest
from shardsmith.tensors.dtypes import dtype_name
from shardsmith.tensors.fqn import matches, unwrapped
from shardsmith.tensors.tensors import TensorSource, TensorSpec, is_turned


class InitialSource:
    """One model of a checkpoint.

    Attributes:
        path: The checkpoint.
        format: Its format.
        tensors: Its tensors, of tied ones the kept name only.
        record: What its metadata.json says of where it came from, if anything.
    """

    def __init__(self, path: Path, weights: str, *, as_files: bool = False) -> None:
        """Open it.

        Args:
            path: The checkpoint.
            weights: Which model.
            as_files: Of a checkpoint whose weights are Hugging Face files, read these under their own names.

        Raises:
            CheckpointError: it cannot be read.
        """
        self.path = path
        known = known_checkpoint(path)
        record = known.manifest.weights if as_files and known.is_ours and known.manifest is not None else None
        self.format = known.format.name if record is None else HUGGINGFACE
        opened = known.open(weights) if record is None else _files_of(path, record, weights)
        self._keys = opened.keys
        self._files = opened.specs
        self.tensors: TensorSource = opened
        self._metadata: CheckpointMetadata | None = read_metadata(path) if self.format == SHARDED else None
        self.record: InitialRecord | None = self._metadata.initial if self._metadata else None
        self.ties: dict[str, str] = dict(opened.aliases)

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """The tensors by the model's names."""
        return self.tensors.specs

    def match(self, live: LiveWeights, ties: Mapping[str, str]) -> None:
        """Read the tensors under the names of a live model, where those of a wrapper or of files are others.

        Args:
            live: The live model's tensors.
            ties: What is one tensor, as far as the source does not say it: alias -> kept name.
        """
        self.ties = {**ties, **self.ties}
        # A checkpoint of ours has the model's own names; several parts have no class that could say the names of all.
        if self._fits(live) or self._metadata is not None or len(live.parts) != 1:
            return
        own = self.tensors
        assert isinstance(own, ModelSource)
        found = match_names(own.specs, live.specs, ClassNames.of_model(unwrapped(live.parts[0])), own.aliases)
        # First by name alone, which cuts no tensor up.
        self.tensors = renamed(own, found)
        if self._fits(live):
            return
        try:
            # The class's conversions start from the files' own names.
            name_map = TransformersNames.of_model(unwrapped(live.parts[0]), own.specs)
            if name_map is not None:
                wanted = {name: spec for name, spec in live.specs.items() if name not in self.ties}
                aliases = {alias: kept for alias, kept in self.ties.items() if kept in wanted}
                self.tensors = RestoredModel(own, name_map, wanted, aliases)
        except (MismatchError, UnsupportedFormatError):
            return  # then what was matched by name is compared, and every difference is said

    def _fits(self, live: LiveWeights) -> bool:
        turned = any(name in live.specs and is_turned(spec, live.specs[name]) for name, spec in self.specs.items())
        return not turned and all(name in live.specs or name in self.ties for name in self.specs)

    def translate(
        self,
        names: NameMap,
        specs: Mapping[str, TensorSpec],
        ties: Mapping[str, str],
        allow_missing: Sequence[str] = (),
    ) -> None:
        """Read the tensors under the names of a model that a map translates into those of the files.

        Args:
            names: From the model's names to those of the files.
            specs: All tensors of the model, on whatever rank.
            ties: As in ``match``.
            allow_missing: Patterns of tensors of the model that the files need not have.

        Raises:
            MismatchError: the files lack tensors, or have them in other shapes.
            UnsupportedFormatError: the map does not know the model.
        """
        self.ties = {**ties, **self.ties}
        wanted = {name: spec for name, spec in specs.items() if name not in self.ties}
        if allow_missing:
            lacking = _lacking(names, wanted, self.tensors)
            wanted = {n: spec for n, spec in wanted.items() if n not in lacking or not matches(n, allow_missing)}
        aliases = {alias: kept for alias, kept in self.ties.items() if alias in specs and kept in wanted}
        left_out = names.leaves_out(wanted) if isinstance(names, LeavesOut) else {}
        made = dict(names.make(left_out)) if isinstance(names, MakesBuffers) else {}
        self.tensors = RestoredModel(self.tensors, names, wanted, aliases, made)

    @property
    def unused(self) -> dict[str, TensorSpec]:
        """Tensors of the files that a model with other names has no place for."""
        names = self.tensors.unused if isinstance(self.tensors, RestoredModel) else ()
        return {name: self._files[name] for name in names}

    def key_of(self, name: str) -> str | None:
        """Return the tensor that holds what the model calls so; None without any."""
        if name in self.specs:
            return name
        root = self.ties.get(name, name)
        # Any name of the tied group may be the one under which the source has the tensor.
        group = (other for other, kept in [(root, root), *self.ties.items()] if kept == root)
        return next((other for other in group if other in self.specs), None)

    def recorded_digest(self, key: str, dtype: torch.dtype) -> Digest | None:
        """Return what metadata.json says the digest is, if it says so for this dtype."""
        if self._metadata is None:
            return None
        record = self._metadata.tensors.get(self._keys[key])
        # A digest is of bytes: in another dtype it says nothing.
        return Digest.parse(record.digest) if record and record.dtype == dtype_name(dtype) else None

    def close(self) -> None:
        """Close the files."""
        self.tensors.close()


def _files_of(path: Path, record: Mapping[str, WeightsRecord], weights: str) -> ModelSource:
    if weights not in record:
        raise CheckpointNotFoundError(path, f"has no {weights!r} weights; it holds {', '.join(record)}")
    return ModelSource.whole(open_safetensors_directory(path / record[weights].folder, record[weights].stem))


def _lacking(names: NameMap, specs: Mapping[str, TensorSpec], files: TensorSource) -> set[str]:
    """The tensors of a model of which the files do not have all."""
    targets = names.targets(specs)
    return {source for name, target in targets.items() if name not in files.specs for source in target.sources}


def read_record(path: Path) -> InitialRecord | None:
    """What a checkpoint's metadata.json says of where it came from; None where it says nothing, or is not there."""
    try:
        return read_metadata(path).initial
    except CheckpointError:
        return None
