"""The header of a safetensors file: built as the safetensors library builds it, read with every claim checked.

    8 bytes    N, the length of the JSON text, unsigned little-endian
    N bytes    {"__metadata__": {str: str}, name: {"dtype": str, "shape": [int], "data_offsets": [begin, end]}, ...}
               padded with spaces, so that the data starts at a multiple of 8
    the rest   the tensors, row-major, little-endian, without holes or overlaps; data_offsets count from here

Reading refuses whatever the library refuses, and what it lets pass although the format forbids it or no tensor can
come of it: duplicate names, NUL in names, leading blanks, padding other than spaces, empty shapes that overflow.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Never

import torch

from shardsmith.errors import CorruptCheckpointError, IncompleteCheckpointError, UnsupportedFormatError, UsageError
from shardsmith.ground.json_budget import require_json_budget
from shardsmith.tensors.tensors import Shape, TensorSpec

MAX_HEADER_BYTES = 100_000_000
"""The library's own limit of N."""
PT_METADATA: Mapping[str, str] = {"format": "pt"}
"""What transformers expects to find in a file of PyTorch tensors."""

_PREFIX_BYTES = 8
_MAX_BYTES = 2**63
_MAX_DIMS = 64
_METADATA_KEY = "__metadata__"
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}

# In the library's own order, narrow to wide: a file holds its tensors by descending dtype, so that all are aligned.
_DTYPES = {
    "BOOL": torch.bool,
    "F4": torch.float4_e2m1fn_x2,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_RANKS = {dtype: rank for rank, dtype in enumerate(_NAMES)}


@dataclass(frozen=True, slots=True)
class TensorPlacement:
    """Where one tensor lies in its file: from byte ``begin`` of the file up to ``end``."""

    spec: TensorSpec
    begin: int

    @property
    def end(self) -> int:
        """Byte offset just past the tensor."""
        return self.begin + self.spec.nbytes


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says it holds: tensors by name, in the order of their data, and the free-form metadata."""

    tensors: dict[str, TensorPlacement]
    metadata: dict[str, str]


class _UnsupportedError(ValueError):
    """Valid safetensors that has no torch counterpart."""


def place_tensors(specs: Iterable[TensorSpec], data_begin: int) -> dict[str, TensorPlacement]:
    """Return where the library would put these tensors: by descending dtype, then by name, without gaps.

    Raises:
        UsageError: when safetensors cannot hold them: a dtype, a name, or a name twice.
    """
    specs = list(specs)
    _check_writable(specs)
    tensors = {}
    # The library sorts by dtype, wide first, so that each tensor is aligned without padding.
    begin = data_begin
    for spec in sorted(specs, key=lambda spec: (-_RANKS[spec.dtype], spec.name)):
        tensors[spec.name] = TensorPlacement(spec, begin)
        begin += spec.nbytes
    return tensors


def build_header(specs: Iterable[TensorSpec], metadata: Mapping[str, str] = PT_METADATA) -> bytes:
    """Return the bytes before the data, prefix and padding included: equal to what the library writes.

    Raises:
        UsageError: as ``place_tensors``, and when the header would be larger than readers accept.
    """
    document: dict[str, Any] = {_METADATA_KEY: dict(sorted(metadata.items()))}
    for name, tensor in place_tensors(specs, data_begin=0).items():
        shape, dtype = _stored_shape(tensor.spec), _NAMES[tensor.spec.dtype]
        document[name] = {"dtype": dtype, "shape": shape, "data_offsets": [tensor.begin, tensor.end]}
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    # The prefix has 8 bytes, so the data begins at a multiple of 8, too.
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise UsageError(f"{len(document) - 1} tensors need a header of {len(text)} bytes; use more, smaller shards")
    return len(text).to_bytes(_PREFIX_BYTES, "little") + text


def read_header(path: str | Path, size: int, read: Callable[[int, int], bytes]) -> Header:
    """Return the header of a file of ``size`` bytes, with everything in it checked against the size and against itself.

    Args:
        path: For the messages only.
        size: Size of the file, in bytes.
        read: ``read(offset, length)`` gives these bytes of the file; asked for nothing past its end.

    Raises:
        IncompleteCheckpointError: the file is shorter than its header says.
        UnsupportedFormatError: it holds a dtype that torch does not have.
        CorruptCheckpointError: anything else is wrong with it.
    """
    try:
        text = _read_text(path, size, read)
        # JSON before types, types before sizes: each step can rely on what the one before has checked.
        document = _parse_json(text)
        metadata = _parse_metadata(document.pop(_METADATA_KEY, {}))
        tensors = _parse_tensors(document, _PREFIX_BYTES + len(text))
    except _UnsupportedError as error:
        raise UnsupportedFormatError(path, str(error)) from None
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpointError(path, f"not a valid safetensors header: {error}") from None
    _check_size(path, size, max((tensor.end for tensor in tensors.values()), default=_PREFIX_BYTES + len(text)))
    return Header(tensors, metadata)


def unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For ``json.loads(object_pairs_hook=...)``: a dict, or ValueError where JSON would let a key be there twice."""
    found = dict(pairs)
    # json keeps the last of two equal keys: another reader may keep the first and see another tensor.
    if len(found) != len(pairs):
        raise ValueError("duplicate keys")
    return found


def quote(value: object) -> str:
    """Something out of a file as it may stand in a message: short, however long it is."""
    return repr(value[:100] if isinstance(value, str) else type(value).__name__)


def _read_text(path: str | Path, size: int, read: Callable[[int, int], bytes]) -> bytes:
    if size < _PREFIX_BYTES:
        raise IncompleteCheckpointError(path, f"expected a header length of {_PREFIX_BYTES} bytes, found {size} bytes")
    length = int.from_bytes(read(0, _PREFIX_BYTES), "little")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"its length of {length} bytes is over the limit of {MAX_HEADER_BYTES}")
    if _PREFIX_BYTES + length > size:
        raise IncompleteCheckpointError(path, f"expected {_PREFIX_BYTES + length} bytes of header, found {size} bytes")
    return read(_PREFIX_BYTES, length)


def _check_size(path: str | Path, size: int, expected: int) -> None:
    if size < expected:
        raise IncompleteCheckpointError(path, f"truncated: expected {expected} bytes, found {size}")
    if size > expected:
        raise CorruptCheckpointError(path, f"expected {expected} bytes, found {size}: bytes that belong to no tensor")


def _parse_json(text: bytes) -> dict[str, Any]:
    body = text.rstrip(b" ")
    if not (body.startswith(b"{") and body.endswith(b"}")):
        raise ValueError("not one JSON object padded with spaces")
    require_json_budget(body)
    document: dict[str, Any] = json.loads(
        body.decode(),
        object_pairs_hook=unique_object,
        parse_int=_natural,
        parse_float=_refuse_number,
        parse_constant=_refuse_number,
    )
    return document


def _natural(digits: str) -> int:
    # Before int(): converting a number of millions of digits takes quadratic time.
    if digits.startswith("-") or len(digits) > len(str(_MAX_BYTES)):
        _refuse_number(digits)
    return int(digits)


def _refuse_number(digits: str) -> Never:
    raise ValueError(f"{digits[:40]} is not a size or an offset")


def _parse_metadata(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ValueError(f"{_METADATA_KEY} is not an object of strings")
    for text in (*value, *value.values()):
        text.encode()  # a lone surrogate is a UnicodeEncodeError, which is a ValueError
    return value


def _parse_tensors(document: dict[str, Any], data_begin: int) -> dict[str, TensorPlacement]:
    entries = [_parse_entry(name, entry) for name, entry in document.items()]
    tensors = {}
    # The format allows no holes, whose bytes could be anything, and no overlaps, which would tie tensors.
    expected = 0
    # By begin and end: an empty tensor comes before the one that begins at the same byte.
    for begin, end, spec in sorted(entries, key=lambda entry: entry[:2]):
        if begin != expected:
            fault = "overlap" if begin < expected else "leave a hole"
            raise ValueError(f"tensors {fault}: {quote(spec.name)} begins at {begin}, not at {expected}")
        tensors[spec.name] = TensorPlacement(spec, data_begin + begin)
        expected = end
    return tensors


def _parse_entry(name: str, entry: object) -> tuple[int, int, TensorSpec]:
    name.encode()
    if "\0" in name:
        raise ValueError(f"NUL in the name {quote(name)}")
    if not isinstance(entry, dict) or entry.keys() != _ENTRY_KEYS:
        raise ValueError(f"the entry of {quote(name)} does not have exactly the keys {sorted(_ENTRY_KEYS)}")
    begin, end = _integers(name, entry["data_offsets"], count=2)
    spec = TensorSpec(name, *_parse_type(name, _integers(name, entry["shape"]), entry["dtype"]))
    if begin + spec.nbytes != end:
        raise ValueError(f"{quote(name)} is {spec.nbytes} bytes long, but its offsets are [{begin}, {end}]")
    return begin, end, spec


def _parse_type(name: str, shape: Shape, stored: object) -> tuple[Shape, torch.dtype]:
    dtype = _DTYPES.get(stored) if isinstance(stored, str) else None
    if dtype is None:
        raise _UnsupportedError(f"{quote(name)} has the dtype {quote(stored)}, which torch does not have")
    if len(shape) > _MAX_DIMS:
        raise _UnsupportedError(f"{quote(name)} has {len(shape)} dimensions, torch has at most {_MAX_DIMS}")
    # An empty tensor still needs strides that fit.
    if math.prod(max(size, 1) for size in shape) * dtype.itemsize >= _MAX_BYTES:
        raise ValueError(f"the shape of {quote(name)} overflows")
    if dtype != torch.float4_e2m1fn_x2:
        return shape, dtype
    if not shape or shape[-1] % 2:
        raise _UnsupportedError(f"{quote(name)}: torch packs F4 in pairs, the last dimension of {shape} is not even")
    return (*shape[:-1], shape[-1] // 2), dtype


def _stored_shape(spec: TensorSpec) -> Shape:
    """The shape as files have it: in F4 elements, where torch counts pairs of them. Inverse of ``_parse_type``."""
    return (*spec.shape[:-1], spec.shape[-1] * 2) if spec.dtype == torch.float4_e2m1fn_x2 else spec.shape


def _integers(name: str, values: object, count: int | None = None) -> Shape:
    if not isinstance(values, list) or any(type(value) is not int for value in values):
        raise ValueError(f"the shape or the offsets of {quote(name)} are not a list of integers")
    if count is not None and len(values) != count:
        raise ValueError(f"{quote(name)} has {len(values)} offsets, not {count}")
    return tuple(values)


def _check_writable(specs: list[TensorSpec]) -> None:
    problems = [f"{name!r}: there {count} times" for name, count in Counter(s.name for s in specs).items() if count > 1]
    problems += [f"{spec.name!r}: {problem}" for spec in specs if (problem := _writing_problem(spec))]
    if problems:
        raise UsageError("safetensors cannot hold these tensors\n  " + "\n  ".join(problems))


def _writing_problem(spec: TensorSpec) -> str | None:
    if spec.name == _METADATA_KEY or "\0" in spec.name or re.search("[\ud800-\udfff]", spec.name):
        return "not a name that a file can hold"
    if spec.dtype not in _NAMES:
        return f"there is no safetensors dtype for {spec.dtype}"
    return "a single pair of F4 has no shape" if spec.dtype == torch.float4_e2m1fn_x2 and not spec.shape else None
