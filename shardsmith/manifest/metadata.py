"""``metadata.json``: what a sharded checkpoint says of itself. Reading it never unpickles anything.

The field names here are the names in the file; docs/format.md specifies them.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import platform
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from json.encoder import encode_basestring_ascii as _quote
from pathlib import Path
from typing import Any

import torch

from shardsmith.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    UnsupportedFormatError,
)
from shardsmith.ground import layout
from shardsmith.ground.bounded import read_bounded
from shardsmith.ground.garbage import without_collection
from shardsmith.ground.json_budget import require_json_budget
from shardsmith.manifest.fields import (
    count,
    counts,
    digest_text,
    known_dtype,
    require_fields,
    shape,
    texts,
    typed,
    typed_or_none,
)
from shardsmith.manifest.initial import InitialRecord
from shardsmith.manifest.seal import SEAL, UNSEALED, require_seal, sealed
from shardsmith.manifest.weights import WeightsRecord
from shardsmith.tensors.tensors import TensorSpec

SCHEMA_VERSION = 5
"""The newest that is read. Each is written as the oldest version that has all its fields: 5 with ``names``, 4 with
``weights`` that have a ``rest``, 3 with others, 2 with ``initial``, 1 with none of them."""
_ADDED = {"initial": 2, "weights": 3, "names": 5}
"""Field -> the schema version that has added it. Version 4 has one more in each record of ``weights``."""
CHECKPOINT_TYPE = "sharded"
_MOST_BYTES = 1 << 25
"""Of a config, an index, a trainer's state and so on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """One file of the checkpoint."""

    size: int
    """Bytes."""
    xxh3_128: str
    """XXH3-128 of its bytes, 32 hexadecimal digits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorRecord:
    """One tensor of the checkpoint, by its key in the DCP index."""

    shape: tuple[int, ...]
    """Global shape."""
    dtype: str
    """As torch names it, without ``torch.``."""
    digest: str
    """``shardsmith.tensors.digest`` of the global tensor, 32 hexadecimal digits."""

    def spec(self, name: str) -> TensorSpec:
        """As a ``TensorSpec`` of that name."""
        return TensorSpec(name, self.shape, getattr(torch, self.dtype))


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelRecord:
    """Counts of one model in the checkpoint."""

    tensors: int
    elements: int
    """Aliases of a tied tensor are not counted."""
    dtypes: dict[str, int]
    """Elements by dtype."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointMetadata:
    """The content of ``metadata.json``."""

    attempt: str
    """Id of the attempt that wrote it, 16 hexadecimal digits."""
    step: int
    """Optimizer steps done."""
    created_at: str
    """UTC, ISO 8601."""
    models: tuple[str, ...]
    """``main``, ``ema``."""
    counts: dict[str, ModelRecord]
    """By model."""
    ema: dict[str, Any] | None
    """Decay, updates, start and so on of the average, or None without one."""
    tied: dict[str, str]
    """Model FQN -> the FQN it is the same tensor as, and under which a Hugging Face directory keeps it."""
    world_size: int
    mesh: dict[str, Any] | None
    """``shape`` and ``dim_names`` of the device mesh of the parameters, or None if they are not DTensors."""
    files: dict[str, FileRecord]
    """Every file beside metadata.json, by name."""
    tensors: dict[str, TensorRecord]
    """Every tensor, by key."""
    libraries: dict[str, str] = field(default_factory=lambda: _libraries())
    initial: InitialRecord | None = None
    """What it was made of, if training is to start from it; None for what a training saved."""
    weights: dict[str, WeightsRecord] | None = None
    """By model (``main``, ``ema``), the Hugging Face directory that holds its tensors; None if all are in DCP files."""
    names: dict[str, Any] | None = None
    """By name in Hugging Face files, which elements of which tensors of the model they are, as ``name_maps.recorded``
    writes it; None where the run knew no such names, or ``weights`` has them."""
    sealed: int = field(default=0, compare=False)
    """Bytes of the file that this was read from, if they had their own hash and it was right. Not in the file."""

    @property
    def schema_version(self) -> int:
        """The oldest that can say this."""
        if self.names is not None:
            return 5
        if self.weights is not None:
            return 4 if any(record.rest for record in self.weights.values()) else 3
        return 1 if self.initial is None else 2

    def to_json(self) -> bytes:
        """As the bytes of the file."""
        content = {name: getattr(self, name) for name in self.__slots__ if name != "sealed"}
        for name in _fields_after(self.schema_version):
            del content[name]
        if self.schema_version == 3:
            content["weights"] = {model: _without_rest(record) for model, record in (self.weights or {}).items()}
        content |= {"checkpoint_type": CHECKPOINT_TYPE, "schema_version": self.schema_version}
        return sealed_json(content)


def sealed_json(content: Mapping[str, Any]) -> bytes:
    """A JSON object as the bytes of a file whose last field is their own XXH3-128, taken with zeros in its place."""
    return sealed(_object_text({**content, SEAL: UNSEALED}).encode())


_encode = json.JSONEncoder(allow_nan=False, indent=1).encode


def _object_text(content: Mapping[str, Any]) -> str:
    return "{\n" + ",\n".join(f" {_encode(name)}: {_field_text(value)}" for name, value in content.items()) + "\n}\n"


def _field_text(value: Any) -> str:
    """A field as JSON, indented by one."""
    if isinstance(value, dict) and value and all(type(row) is TensorRecord for row in value.values()):
        return "{\n" + ",\n".join(f"  {_quote(name)}: {_tensor_text(row)}" for name, row in value.items()) + "\n }"
    return _encode(_plain(value)).replace("\n", "\n ")


def _tensor_text(record: TensorRecord) -> str:
    """As the encoder would write it, which takes a hundred times as long for the tensors of a large model."""
    sizes = ",".join(f"\n    {size}" for size in record.shape)
    shape = f"[{sizes}\n   ]" if sizes else "[]"
    return f'{{\n   "shape": {shape},\n   "dtype": "{record.dtype}",\n   "digest": "{record.digest}"\n  }}'


def _plain(value: Any) -> Any:
    """Of dataclasses what JSON knows."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    kinds = FileRecord | ModelRecord | InitialRecord | WeightsRecord
    return dataclasses.asdict(value) if isinstance(value, kinds) else value


def now() -> str:
    """Return the present time as ``created_at`` wants it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def has_manifest(directory: Path) -> bool:
    """Return whether there is a ``metadata.json`` of ours, of any version and in any state; not somebody else's."""
    path = directory / layout.METADATA_FILE
    if not path.exists():
        return False
    try:
        return _is_ours(read_json(path))
    except CorruptCheckpointError:
        return True


def read_metadata(directory: Path) -> CheckpointMetadata:
    """Read and validate ``metadata.json`` of a checkpoint directory.

    Raises:
        CheckpointNotFoundError: there is none.
        CorruptCheckpointError: it is not what ``to_json`` writes.
        UnsupportedFormatError: another kind of file of that name, or of a newer version.
    """
    metadata = find_metadata(directory)
    if metadata is None:
        raise UnsupportedFormatError(directory / layout.METADATA_FILE, "is not a checkpoint manifest of Shardsmith")
    return metadata


def find_metadata(directory: Path) -> CheckpointMetadata | None:
    """Return what ``read_metadata`` does; None for a ``metadata.json`` of another project. Raises the same."""
    path = directory / layout.METADATA_FILE
    found = _known_metadata(path, _read_bytes(path))
    if found is None:
        return None
    # The cached object is shared: callers may change their own dicts.
    return dataclasses.replace(found, files=dict(found.files), tensors=dict(found.tensors), tied=dict(found.tied))


@functools.lru_cache(maxsize=1)  # a resume reads it six times, and each takes seconds where there are 100,000 tensors
def _known_metadata(path: Path, data: bytes) -> CheckpointMetadata | None:
    with without_collection():
        return _metadata_of(path, data)


def _metadata_of(path: Path, data: bytes) -> CheckpointMetadata | None:
    content = _object(path, data)
    if not _is_ours(content):
        return None
    # The version comes before the seal: a newer version may seal in another way.
    found = content.get("schema_version")
    if "schema_version" in content and (type(found) is not int or not 1 <= found <= SCHEMA_VERSION):
        raise UnsupportedFormatError(path, f"has schema version {found!r}; this version reads 1 to {SCHEMA_VERSION}")
    is_sealed = require_seal(path, data, content)
    try:
        return dataclasses.replace(_parse(content), sealed=len(data) if is_sealed else 0)
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptCheckpointError(path, f"is damaged: {type(error).__name__}: {error}") from error


def _is_ours(content: Mapping[str, Any]) -> bool:
    # What says otherwise and is sealed as ours was damaged there.
    return (content.get("checkpoint_type") == CHECKPOINT_TYPE and "schema_version" in content) or SEAL in content


def read_json(path: Path, *, sealed: bool = False) -> dict[str, Any]:
    """Read a JSON object from a regular file.

    Args:
        path: The file.
        sealed: It may have its own hash in it, which is compared and left out of the result.

    Raises:
        CheckpointNotFoundError: no such file.
        CorruptCheckpointError: not a regular file, larger than 32 MiB (manifests: 512 MiB), no JSON object, or changed
            since it was written.
    """
    data = _read_bytes(path)
    content = _object(path, data)
    if sealed:
        require_seal(path, data, content)
    return content


def _read_bytes(path: Path) -> bytes:
    """What is in a JSON file."""
    is_ours = path.name in (layout.METADATA_FILE, layout.PROVENANCE_FILE)
    try:
        return read_bounded(path, layout.MOST_MANIFEST_BYTES if is_ours else _MOST_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointNotFoundError(path, "does not exist") from error
    except ValueError as error:
        raise CorruptCheckpointError(path, f"is not a JSON file: {error}") from error
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}") from error


def _object(path: Path, data: bytes) -> dict[str, Any]:
    try:
        require_json_budget(data)
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpointError(path, f"is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CorruptCheckpointError(path, f"holds a JSON {type(content).__name__}, expected an object")
    return content


def _parse(content: Mapping[str, Any]) -> CheckpointMetadata:
    schema = content["schema_version"]
    content = {name: value for name, value in content.items() if name not in ("checkpoint_type", "schema_version")}
    for name in _fields_after(schema):
        if name in content:
            raise ValueError(f"version {schema} has no field {name!r}")
        content[name] = None
    require_fields(content, CheckpointMetadata)
    models = tuple(typed(name, str) for name in typed(content["models"], list))
    if set(models) != set(typed(content["counts"], dict)):
        raise ValueError(f"counts of {sorted(content['counts'])}, but the models are {sorted(models)}")
    return CheckpointMetadata(
        attempt=typed(content["attempt"], str),
        step=count(content["step"]),
        created_at=typed(content["created_at"], str),
        models=models,
        counts={name: _model_record(record) for name, record in content["counts"].items()},
        ema=_average(content["ema"]),
        tied=texts(content["tied"]),
        world_size=count(content["world_size"]),
        mesh=typed_or_none(content["mesh"], dict),
        files={name: file_record(record) for name, record in typed(content["files"], dict).items()},
        tensors={name: tensor_record(record) for name, record in typed(content["tensors"], dict).items()},
        libraries=texts(content["libraries"]),
        # Version 2 was made for ``initial`` and has it always; in all others it may be null.
        initial=None if schema != 2 and content["initial"] is None else InitialRecord.parse(content["initial"]),
        weights=_weights(content["weights"], schema),
        names=typed_or_none(content["names"], dict),
    )


def _average(facts: Any) -> dict[str, Any] | None:
    found: dict[str, Any] | None = typed_or_none(facts, dict)
    decay = (found or {}).get("decay")
    if decay is not None and (type(decay) not in (int, float) or not 0 <= decay <= 1):
        raise ValueError(f"the average's decay is {reprlib.repr(decay)}, expected a number from 0 to 1")
    return found


def _fields_after(version: int) -> list[str]:
    """Those that a schema version does not have."""
    return [name for name, since in _ADDED.items() if since > version]


def _without_rest(record: WeightsRecord) -> dict[str, Any]:
    """As version 3 has it."""
    return {"folder": record.folder, "stem": record.stem, "slices": record.slices}


def _weights(records: Any, schema: int) -> dict[str, WeightsRecord] | None:
    if records is None:
        return None
    if schema == 3:
        if wrong := [model for model, record in typed(records, dict).items() if "rest" in typed(record, dict)]:
            raise ValueError(f"version 3 has no field 'rest', as {wrong[0]} has")
        records = {model: {**record, "rest": False} for model, record in records.items()}
    return {typed(model, str): WeightsRecord.parse(record) for model, record in typed(records, dict).items()}


def file_record(record: Any) -> FileRecord:
    """From JSON. Raises KeyError, TypeError or ValueError if it is none."""
    require_fields(record, FileRecord)
    return FileRecord(size=count(record["size"]), xxh3_128=digest_text(record["xxh3_128"]))


def tensor_record(record: Any) -> TensorRecord:
    """From JSON. Raises KeyError, TypeError or ValueError if it is none."""
    require_fields(record, TensorRecord)
    return TensorRecord(
        shape=shape(record["shape"]), dtype=known_dtype(record["dtype"]), digest=digest_text(record["digest"])
    )


def _model_record(record: Any) -> ModelRecord:
    require_fields(record, ModelRecord)
    return ModelRecord(
        tensors=count(record["tensors"]), elements=count(record["elements"]), dtypes=counts(record["dtypes"])
    )


def _libraries() -> dict[str, str]:
    """Asked of the modules: a clone that was not installed has no metadata of the package."""
    import shardsmith

    return {"shardsmith": shardsmith.__version__, "torch": str(torch.__version__), "python": platform.python_version()}
