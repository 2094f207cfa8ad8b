"""Pickles put together by hand, piece by piece, so that tests can say things which no pickler would write."""

from __future__ import annotations

import pickle
import struct

CHECKPOINT = "torch.distributed.checkpoint.metadata"
OLD_TORCH = "torch.distributed._shard.sharded_tensor.metadata"


def text(value: str) -> bytes:
    data = value.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    data = value.to_bytes(9, "little", signed=True)
    return pickle.LONG1 + bytes([len(data)]) + data


def sequence(*items: bytes) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE


def listing(*items: bytes) -> bytes:
    return pickle.EMPTY_LIST + pickle.MARK + b"".join(items) + pickle.APPENDS


def mapping(items: dict[bytes, bytes]) -> bytes:
    pairs = b"".join(key + value for key, value in items.items())
    return pickle.EMPTY_DICT + pickle.MARK + pairs + pickle.SETITEMS


def name(module: str, attribute: str) -> bytes:
    return text(module) + text(attribute) + pickle.STACK_GLOBAL


def call(of: bytes, *args: bytes) -> bytes:
    return of + sequence(*args) + pickle.REDUCE


def record(of: bytes, fields: dict[str, bytes]) -> bytes:
    state = mapping({text(key): value for key, value in fields.items()})
    return of + pickle.EMPTY_TUPLE + pickle.NEWOBJ + state + pickle.BUILD


def size(*numbers: int) -> bytes:
    return call(name("torch", "Size"), sequence(*map(number, numbers)))


def whole(body: bytes, protocol: int = 4) -> bytes:
    return pickle.PROTO + bytes([protocol]) + body + pickle.STOP


def properties(
    dtype: bytes | None = None,
    layout: bytes | None = None,
    memory_format: bytes | None = None,
    module: str = CHECKPOINT,
    *more: bytes,
) -> bytes:
    dtype = dtype or name("torch", "float32")
    layout = layout or call(name("torch.serialization", "_get_layout"), text("torch.strided"))
    memory_format = memory_format or call(name(CHECKPOINT, "_MEM_FORMAT_ENCODING"), number(0))
    state = sequence(dtype, layout, pickle.NEWFALSE, memory_format, pickle.NEWFALSE, *more)
    return name(module, "TensorProperties") + pickle.EMPTY_TUPLE + pickle.NEWOBJ + state + pickle.BUILD


def tensor(fields: dict[str, bytes] | None = None) -> bytes:
    """Metadata of a float32 vector of 4 elements in one chunk."""
    chunk = record(name(CHECKPOINT, "ChunkStorageMetadata"), {"offsets": size(0), "sizes": size(4)})
    usual = {"properties": properties(), "size": size(4), "chunks": listing(chunk)}
    return record(name(CHECKPOINT, "TensorStorageMetadata"), usual | (fields or {}))


def storage(fields: dict[str, bytes] | None = None) -> bytes:
    """Where that vector lies."""
    usual = {"relative_path": text("__0_0.distcp"), "offset": number(0), "length": number(1000)}
    return record(name("torch.distributed.checkpoint.filesystem", "_StorageInfo"), usual | (fields or {}))


def index(fields: dict[str, bytes] | None = None) -> bytes:
    """An honest index of the one tensor ``w``, with some fields replaced."""
    key = record(name(CHECKPOINT, "MetadataIndex"), {"fqn": text("w"), "offset": size(0), "index": number(0)})
    usual = {
        "state_dict_metadata": mapping({text("w"): tensor()}),
        "planner_data": mapping({text("w"): sequence(text("w"))}),
        "storage_data": mapping({key: storage()}),
        "storage_meta": pickle.NONE,
        "version": text("1.0.0"),
    }
    return record(name(CHECKPOINT, "Metadata"), usual | (fields or {}))
