"""One tensor in a ``torch.save`` archive that is a byte range of a file."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardsmith.errors import CheckpointError, CorruptCheckpointError, UnsafeCheckpointError, UnsupportedFormatError
from shardsmith.formats.torch_files.budget import require_budget
from shardsmith.formats.torch_files.tensor_pickle import MAX_TENSOR_PICKLE_BYTES, read_tensor_pickle
from shardsmith.formats.torch_files.zip import TorchZip, UnusualArchiveError
from shardsmith.ground.file_tensor import FileTensor
from shardsmith.ground.mapped import MappedFile

_MAX_ENTRIES = 64
_HEAD_BYTES = 1 << 16
_WRAPPED = re.compile(rb"_rebuild_wrapper_subclass\n.{0,16}?c([\w.]+)\n(\w+)\n", re.DOTALL)
DEQUANTIZE = (
    "such are not read. Save plain tensors: {n: v.dequantize() if hasattr(v, 'tensor_data_names') else v for n, v in "
    "model.state_dict().items()}"
)
_SMALL_BYTES = 2048
"""Of an archive of a number or a short text."""


def read_archived_tensor(file: MappedFile, offset: int, length: int) -> FileTensor | Tensor:
    """Return the tensor in an archive: where it lies in the file, or a copy where torch has to unpack it.

    Args:
        file: The file that holds the archive.
        offset: Where the archive begins in the file, in bytes.
        length: Its length in bytes.

    Returns:
        A CPU tensor with the shape and strides that were saved. Its data need not be aligned. Never write to it.

    Raises:
        IncompleteCheckpointError: when the file ends before the archive does.
        CorruptCheckpointError: when it is no archive of one tensor.
        UnsafeCheckpointError: when it asks for code to be run.
        UnsupportedFormatError: when the tensor is made of others.
    """
    stored = _stored(file, offset, length)
    return _unpacked(file, offset, length) if stored is None else stored


def _stored(file: MappedFile, offset: int, length: int) -> FileTensor | None:
    """Where the tensor lies, or None when the archive is not of the usual kind."""
    try:
        archive = TorchZip(file, offset, length, _MAX_ENTRIES)
        record = read_tensor_pickle(archive.content("data.pkl", MAX_TENSOR_PICKLE_BYTES))
        return None if record is None else archive.tensor(record)
    except UnusualArchiveError:
        return None


def tensor_class(file: MappedFile, offset: int, length: int) -> str | None:
    """Return the class of the tensor in an archive, as ``wrapped_class``."""
    return wrapped_class(file.bytes(offset, min(length, _HEAD_BYTES)))


def wrapped_class(pickled: bytes) -> str | None:
    """Return the class of the first tensor in a pickle that consists of others; None if there is none.

    Of such a class are the quantised weights of torchao. The index of DCP has the shape and dtype that it plays.
    """
    found = _WRAPPED.search(pickled)
    return None if found is None else f"a tensor of {found[1].decode()}.{found[2].decode()}, which is made of others"


def read_archived_object(file: MappedFile, offset: int, length: int, *, allow_pickle: bool = False) -> Any:
    """Return the value in an archive, of any type that torch deems safe.

    Args:
        file: The file that holds the archive.
        offset: Where the archive begins in the file, in bytes.
        length: Its length in bytes.
        allow_pickle: Read any pickle, **which runs whatever code it holds**. Only for files of an author you trust.

    Raises:
        IncompleteCheckpointError: when the file ends before the archive does.
        UnsafeCheckpointError: when it is of a type that is not known to be safe, and ``allow_pickle`` is off.
        UnsupportedFormatError: when it is a tensor that is made of others.
        CorruptCheckpointError: when it is no archive.
    """
    data = file.bytes(offset, length)
    where = f"bytes {offset} to {offset + length}"
    try:
        if length <= _SMALL_BYTES and not allow_pickle:
            # The cached value is shared: a caller that changes its copy must not change that of the next one.
            return copy.deepcopy(_load_small(file.path, data))
        # With allow_pickle the author is trusted, and a budget would only refuse large honest objects.
        if not allow_pickle:
            require_budget(file.path, data)
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=not allow_pickle)
    # From the budget: already says what is wrong, and is not to be turned into damage.
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        if (kind := tensor_class(file, offset, length)) is not None:
            raise UnsupportedFormatError(file.path, f"{where} are {kind}; {DEQUANTIZE}") from error
        raise UnsafeCheckpointError(file.path, f"{where} are of a type that was not read: {error}") from error
    except Exception as error:  # a dozen types, RuntimeError and EOFError among them
        reason = f"{where} are no torch.save archive: {type(error).__name__}: {error}"
        raise CorruptCheckpointError(file.path, reason) from error


@functools.lru_cache(maxsize=1024)
def _load_small(path: Path, data: bytes) -> Any:
    """Of the options of an optimizer's groups a checkpoint has one for each tensor, and few different ones."""
    require_budget(path, data)
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _unpacked(file: MappedFile, offset: int, length: int) -> Tensor:
    """The tensor as torch reads it, for archives that are compressed, or whose tensor is of a special kind."""
    value = read_archived_object(file, offset, length)
    if not isinstance(value, Tensor):
        where = f"bytes {offset} to {offset + length}"
        raise CorruptCheckpointError(file.path, f"{where} hold a {type(value).__name__} where a tensor should be")
    return value.detach()
