"""The bytes that a CPU tensor consists of: as memory that the system can write, and compared with those of another."""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch
from torch import Tensor

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_SAMPLE_BYTES = 256

# torch makes memoryviews by way of numpy, which does not know bfloat16 or float8.
_memory_at = ctypes.pythonapi.PyMemoryView_FromMemory
_memory_at.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)
_memory_at.restype = ctypes.py_object

_advise = ctypes.CDLL(None).madvise
_advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_POPULATE_READ = 22  # of Linux 5.14; the module mmap does not know it yet

_compare = ctypes.CDLL(None).memcmp  # torch.equal takes six times as long; while it runs, other threads may, too
_compare.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


def memory_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor, not copied. Valid only as long as the caller holds the tensor."""
    memory: memoryview = _memory_at(tensor.data_ptr(), tensor.nbytes, 0x100)  # PyBUF_READ
    return memory


def writable_memory_of(tensor: Tensor) -> memoryview:
    """As ``memory_of``, to be written to."""
    memory: memoryview = _memory_at(tensor.data_ptr(), tensor.nbytes, 0x200)  # PyBUF_WRITE
    return memory


def map_pages(tensor: Tensor) -> None:
    """Have all pages of a tensor in a mapped file mapped and read in one go, which costs less than a fault for each.

    Most of all a ``write`` from pages that are not mapped yet is slow: ext4 takes them up one at a time. Does nothing
    where the system cannot do it; what cannot be read is found by whoever reads it.
    """
    if sys.platform == "linux" and tensor.nbytes:
        # `madvise` takes the address of a page only.
        begin = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        _advise(begin, tensor.data_ptr() + tensor.nbytes - begin, _POPULATE_READ)


def as_integers(tensor: Tensor) -> Tensor:
    """Return the same elements as plain integers of the same size, of the same shape. Shares memory where it can."""
    # A conjugation or negation that is still pending is not in the bits that a view would show.
    return tensor.detach().resolve_conj().resolve_neg().view(_BITS[tensor.dtype.itemsize])


def sample_of(tensor: Tensor) -> bytes:
    """Return the first, middle and last bytes of a contiguous CPU tensor: few changes of it leave all of them."""
    count = min(tensor.nbytes, _SAMPLE_BYTES)
    begin, last = tensor.data_ptr(), tensor.nbytes - count
    return b"".join(ctypes.string_at(begin + at, count) for at in (0, last // 2, last)) if count else b""


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors of one shape and dtype hold the same bits; NaN equals itself, and -0.0 is not 0.0."""
    assert (one.shape, one.dtype) == (other.shape, other.dtype)
    if one.is_contiguous() and other.is_contiguous():
        difference: int = _compare(one.data_ptr(), other.data_ptr(), one.nbytes)
        return difference == 0
    if one.dtype is torch.complex128:  # there is no integer of 16 bytes: its two halves are compared
        one, other = (torch.view_as_real(tensor.detach().resolve_conj()) for tensor in (one, other))
    return torch.equal(as_integers(one), as_integers(other))
