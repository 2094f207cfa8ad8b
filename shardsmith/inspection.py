"""What is in a checkpoint, as data; printing it is the command line's business."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shardsmith.checking.arguments import checked
from shardsmith.checking.types import AnyPath
from shardsmith.errors import CheckpointError
from shardsmith.formats.by_path import DCP, SHARDED, UNKNOWN, KnownCheckpoint, known_checkpoint
from shardsmith.formats.dcp.index import read_index
from shardsmith.ground import layout
from shardsmith.ground.remote_path import as_path
from shardsmith.hf.export_files import find_export_damage, records_files
from shardsmith.manifest.checkpoints import find_damage, find_foreign_files, find_lost_manifest
from shardsmith.manifest.companion import companion_of, find_folder_damage, is_complete
from shardsmith.manifest.compared import ComparedBytes, file_sizes
from shardsmith.manifest.metadata import CheckpointMetadata, read_metadata
from shardsmith.tensors.checkpoint_keys import MAIN, KeyPath, find_models
from shardsmith.tensors.dtypes import dtype_name
from shardsmith.tensors.tensors import TensorSpec


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """One model of a checkpoint."""

    name: str
    """``main`` or ``ema``."""
    tensors: int
    parameters: int
    """Elements of all tensors; tied ones count once."""
    nbytes: int
    dtypes: dict[str, int]
    """Elements by dtype."""
    tied: dict[str, str]
    """Alias -> the tensor that it is."""
    from_main: int
    """Tensors that the model does not have itself and takes from main (what an average does not cover)."""
    averages: list[str] = field(default_factory=list)
    """Names of the averages, where they have names; the first one is this."""
    left_out: list[str] = field(default_factory=list)
    """Of main: dicts beside it that are called an average and hold no tensor under its names; they are not read."""


@dataclass(frozen=True, slots=True)
class Inspection:
    """Result of ``inspect_checkpoint``."""

    path: str
    format: str
    reason: str
    step: int | None
    models: tuple[ModelSummary, ...]
    ema: dict[str, Any] | None
    world_size: int | None
    mesh: dict[str, Any] | None
    beside: dict[str, int]
    """Bytes of what lies beside the models, by its first name: optimizer, rng, ..."""
    files: dict[str, int]
    """Bytes by file, by its path in the directory."""
    compared: dict[str, int]
    """Of each of these files, how many bytes were read and are those that were recorded. Without ``verify`` none."""
    created_at: str | None
    libraries: dict[str, str]
    is_recorded: bool
    """Whether hashes of its files are recorded, which ``verify`` can compare them with."""
    verified: bool
    """Whether every byte of every file was read and is as recorded: of ``compared``, not of what was asked for."""
    damage: tuple[str, ...]
    """What is wrong, one line each; empty if nothing was found."""

    @property
    def uncompared(self) -> list[str]:
        """Files of which a byte was not compared with anything recorded."""
        return [name for name, nbytes in self.files.items() if self.compared.get(name) != nbytes]


@checked
def inspect_checkpoint(path: AnyPath, *, verify: bool = False) -> Inspection:
    """Look into a checkpoint of any format. Reads indexes and headers; with ``verify`` every byte, against its hashes.

    Only our own checkpoints, and a trainer's folders with ours in them, have hashes of their files.

    Raises:
        CheckpointNotFoundError: there is nothing at the path.
    """
    path = as_path(path)
    known = known_checkpoint(path)
    found, in_folder = known.format, is_complete(path)
    metadata = known.manifest
    models, damage = _summaries(known)
    if metadata is None and in_folder:
        # A trainer's folder is no checkpoint of ours; the record of its files is in a directory of ours within it.
        try:
            metadata = read_metadata(companion_of(path))
        except CheckpointError as error:
            damage.append(str(error))
    read = ComparedBytes()
    if metadata is not None and verify:
        look = find_folder_damage if in_folder else find_damage
        damage += look(path, manifest=metadata, compared=read)
    if metadata is not None and not in_folder:
        # Files that nobody recorded are found without reading any.
        damage += find_foreign_files(path, metadata)
    if metadata is None and path.is_dir():
        damage += find_lost_manifest(path)
        damage += find_export_damage(path, contents=verify, compared=read)
    beside, more = _beside(path, metadata) if found.name in (SHARDED, DCP) else ({}, [])
    damage += [line for line in more if line not in damage]
    files = _files(known)
    # In a folder, files of the trainer that its record does not name are no damage, and not verified either.
    compared = read.of(path, files) if path.is_dir() else {}
    return Inspection(
        path=str(path),
        format=found.name,
        reason=found.reason,
        step=metadata.step if metadata else None,
        models=tuple(models),
        ema=metadata.ema if metadata else None,
        world_size=metadata.world_size if metadata else None,
        mesh=metadata.mesh if metadata else None,
        beside=beside,
        files=files,
        compared=compared,
        created_at=metadata.created_at if metadata else None,
        libraries=metadata.libraries if metadata else {},
        is_recorded=metadata is not None or records_files(path),
        verified=bool(files) and compared == files,
        damage=tuple(damage),
    )


def _summaries(known: KnownCheckpoint) -> tuple[list[ModelSummary], list[str]]:
    """The models that can be opened, or why they cannot."""
    try:
        models = [_summary(known, name) for name in known.models()]
        # Named as damage: whoever inspects something must not be told that nothing is wrong with it.
        unknown = known.format.name == UNKNOWN
        return models, [f"{known.path}: is no checkpoint of a known format"] if unknown else []
    except CheckpointError as error:
        return [], [str(error)]


def _summary(known: KnownCheckpoint, name: str) -> ModelSummary:
    source = known.open(name)
    dtypes: dict[str, int] = {}
    for spec in source.specs.values():
        dtypes[dtype_name(spec.dtype)] = dtypes.get(dtype_name(spec.dtype), 0) + spec.numel
    summary = ModelSummary(
        name=name,
        tensors=len(source.specs),
        parameters=sum(dtypes.values()),
        nbytes=sum(spec.nbytes for spec in source.specs.values()),
        dtypes=dtypes,
        tied=source.aliases,
        from_main=len(source.filled),
        averages=list(source.averages),
        left_out=list(source.left_out) if name == MAIN else [],
    )
    source.close()
    return summary


def _beside(path: Path, manifest: CheckpointMetadata | None) -> tuple[dict[str, int], list[str]]:
    """Bytes of tensors that belong to no model, by the first part of their path; or why that cannot be told."""
    try:
        return _sizes_beside(path, manifest), []
    except CheckpointError as error:
        return {}, [str(error)]


def _sizes_beside(path: Path, manifest: CheckpointMetadata | None) -> dict[str, int]:
    specs: dict[str, TensorSpec] = {}
    paths: Mapping[str, KeyPath] = {}
    # A step whose weights are Hugging Face files has the rest in DCP files: then index and record are both needed.
    if has_index := (path / layout.DCP_INDEX_FILE).exists():
        index = read_index(path)
        specs, paths = {key: entry.spec for key, entry in index.tensors.items()}, index.containers
    if not has_index or (manifest is not None and manifest.weights is not None):
        written = (manifest or read_metadata(path)).tensors
        specs |= {key: record.spec(key) for key, record in written.items()}
    # By their place in the nested state dict; a flat key says it by its first part.
    of_models = {key for names in find_models(specs, paths).values() for key in names.values()}
    sizes: dict[str, int] = {}
    for key, spec in specs.items():
        if key not in of_models:
            first = str(paths.get(key, (key,))[0]).split(".", 1)[0]
            sizes[first] = sizes.get(first, 0) + spec.nbytes
    return sizes


def _files(known: KnownCheckpoint) -> dict[str, int]:
    path = known.path
    if path.is_file():
        return {path.name: path.stat().st_size}
    if known.format.name != UNKNOWN:
        return file_sizes(path)
    # What is no checkpoint may be a whole disk: only what lies in it at the top.
    # A dangling link is there, and has a size of its own.
    return {file.name: file.lstat().st_size for file in sorted(path.iterdir()) if file.is_symlink() or file.is_file()}
