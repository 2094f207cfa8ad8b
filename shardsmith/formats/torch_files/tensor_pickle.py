"""What the ``data.pkl`` in a ``torch.save`` archive says when the archive holds one plain tensor."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from shardsmith.errors import CheckpointError
from shardsmith.formats.dcp.index_pickle import DTYPES, MAX_DIMS
from shardsmith.formats.torch_files.pickle_machine import ORDERED_DICT, PERSISTENT, Made, Name, read_pickle

# The pickle of one tensor has some hundred bytes.
MAX_TENSOR_PICKLE_BYTES = 1 << 14


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """How a tensor lies in the payload that was saved with it.

    ``storage`` names the payload; ``offset``, ``size`` and ``stride`` count elements. The elements that they reach lie
    within ``storage_nbytes``.
    """

    dtype: torch.dtype
    storage: str
    storage_nbytes: int
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def span(self) -> int:
        """Number of elements from the first to the last one; 0 for an empty tensor."""
        if 0 in self.size:
            return 0
        return 1 + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))

    @property
    def end(self) -> int:
        """First byte of the payload behind the tensor."""
        return (self.offset + self.span) * self.dtype.itemsize


_STORAGE_DTYPES = {
    Name("torch", "DoubleStorage"): torch.float64,
    Name("torch", "FloatStorage"): torch.float32,
    Name("torch", "HalfStorage"): torch.float16,
    Name("torch", "BFloat16Storage"): torch.bfloat16,
    Name("torch", "LongStorage"): torch.int64,
    Name("torch", "IntStorage"): torch.int32,
    Name("torch", "ShortStorage"): torch.int16,
    Name("torch", "CharStorage"): torch.int8,
    Name("torch", "ByteStorage"): torch.uint8,
    Name("torch", "BoolStorage"): torch.bool,
    Name("torch", "ComplexDoubleStorage"): torch.complex128,
    Name("torch", "ComplexFloatStorage"): torch.complex64,
}
_UNTYPED = Name("torch.storage", "UntypedStorage")
_TENSOR = Name("torch._utils", "_rebuild_tensor_v2")
_TENSOR_WITH_DTYPE = Name(
    "torch._utils", "_rebuild_tensor_v3"
)  # float8, uint16 and other dtypes without a storage class
_PARAMETER = Name("torch._utils", "_rebuild_parameter")
TENSOR_NAMES = frozenset({_UNTYPED, _TENSOR, _TENSOR_WITH_DTYPE, _PARAMETER, ORDERED_DICT, *_STORAGE_DTYPES, *DTYPES})
"""All that the pickle of a tensor names."""


class UnusualPickleError(ValueError):
    """A pickle describes something else than plain tensors."""


# Chunks of one shape and dtype have the same pickle, byte for byte: a checkpoint has few different ones.
@functools.lru_cache(maxsize=1024)
def read_tensor_pickle(data: bytes) -> TensorRecord | None:
    """Return the tensor that a pickle describes, or None when it describes anything but one dense tensor or parameter.

    None is no verdict: the caller may try ``torch.load(weights_only=True)``, which knows more kinds and refuses what is
    unsafe.
    """
    if len(data) > MAX_TENSOR_PICKLE_BYTES:
        return None
    try:
        return tensor_record(read_pickle(data, Path("data.pkl"), TENSOR_NAMES, persistent_ids=True))
    except (CheckpointError, UnusualPickleError):
        return None


def is_tensor(value: object) -> bool:
    """Return whether part of a pickle is a plain tensor or parameter, as ``tensor_record`` reads it."""
    return type(value) is Made and value.of in (_TENSOR, _TENSOR_WITH_DTYPE, _PARAMETER)


def tensor_record(value: object) -> TensorRecord:
    """Return the tensor that part of a pickle is. Raises UnusualPickleError if it is none, or contradicts itself."""
    kind, args = _made(value)
    if kind == _PARAMETER and len(args) == 3:
        _no_hooks(args[2])
        # A parameter wraps a tensor: (tensor, requires_grad, hooks).
        kind, args = _made(args[0])
    dtype = None
    if kind == _TENSOR_WITH_DTYPE and len(args) == 7:
        # The other six are those of v2.
        dtype, args = _dtype(args[6]), args[:6]
    if len(args) != 6 or kind != (_TENSOR if dtype is None else _TENSOR_WITH_DTYPE):
        raise UnusualPickleError
    storage, offset, size, stride, _requires_grad, hooks = args
    _no_hooks(hooks)
    record = TensorRecord(*_storage(storage, dtype), _number(offset), _numbers(size), _numbers(stride))
    if len(record.size) != len(record.stride) or math.prod(record.size) >= 1 << 63:
        raise UnusualPickleError
    # Strides are free: a tensor may overlap itself, but must not reach beyond its storage.
    if record.end > record.storage_nbytes:
        raise UnusualPickleError
    return record


def _storage(value: object, dtype: torch.dtype | None) -> tuple[torch.dtype, str, int]:
    """Element type, name and size in bytes of a payload. ``dtype`` is None where the storage class implies it."""
    kind, args = _made(value)
    match args:
        # The tuple of torch's persistent_id: tag, class, key of the member in data/, device, number of elements.
        case [("storage", Name() as storage_class, str() as key, str() as location, int() as count)]:
            typed = dtype or _STORAGE_DTYPES.get(storage_class)
        case _:
            raise UnusualPickleError
    if kind != PERSISTENT or typed is None or location == "meta" or (dtype and storage_class != _UNTYPED):
        raise UnusualPickleError
    # With a dtype of its own the storage is untyped, and its number counts bytes.
    return typed, key, _number(count) * (1 if dtype else typed.itemsize)


def _dtype(value: object) -> torch.dtype:
    if type(value) is not Name or value not in DTYPES:
        raise UnusualPickleError
    return DTYPES[value]


def _made(value: object) -> tuple[Name, tuple[object, ...]]:
    if type(value) is not Made or value.state is not None:
        raise UnusualPickleError
    return value.of, value.args


def _no_hooks(value: object) -> None:
    if _made(value) != (ORDERED_DICT, ()) or (type(value) is Made and value.items):
        raise UnusualPickleError


def _numbers(value: object) -> tuple[int, ...]:
    if type(value) is not tuple or len(value) > MAX_DIMS:
        raise UnusualPickleError
    return tuple(_number(n) for n in value)


def _number(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise UnusualPickleError
    return value
