"""A float32 tensor as what it is in bfloat16 and a rest of two bytes an element, from which it comes back bit for bit.

The rest is the lower half of an element's bits. bfloat16 has the upper half, one more where the lower half was rounded
up: which it was says the lower half itself, but for a tie, that goes either way, and NaN, which keeps no bits. Such
elements are exceptions, that are kept with the correction of their upper half.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shardsmith.tensors.digest import plain_values

Halves = npt.NDArray[np.uint16]

_TIE = np.uint16(0x8000)


@dataclass(frozen=True, slots=True)
class Rounded:
    """A float32 tensor in its two parts."""

    values: Tensor
    """As ``Tensor.to(torch.bfloat16)`` gives them."""
    rest: Tensor
    """int16, of the same shape."""
    exceptions: npt.NDArray[np.int64]
    """Row-major indices of elements whose upper half is not what ``upper_half`` makes of the two."""
    corrections: Halves
    """What is to be added to the upper half of each exception, modulo 2**16."""


def round_off(tensor: Tensor) -> Rounded:
    """Return the parts of a float32 tensor on the CPU, of any strides. Shares no memory with it."""
    held = plain_values(tensor).view(-1)
    halves = held.view(torch.int16).numpy().view(np.uint16)
    lower, upper = np.ascontiguousarray(halves[0::2]), halves[1::2]  # memory is little-endian here
    values = held.to(torch.bfloat16)
    # What a reader will compute: what differs from it is an exception, whatever the reason.
    made = upper_half(values, lower)
    exceptions = np.flatnonzero(made != upper)
    # uint16 arithmetic wraps around, as the correction of the reader does.
    corrections = upper[exceptions] - made[exceptions]
    rest = torch.from_numpy(lower.view(np.int16))
    return Rounded(values.reshape(tensor.shape), rest.reshape(tensor.shape), exceptions, corrections)


def put_together(
    values: Tensor, rest: Tensor, exceptions: npt.NDArray[np.int64], corrections: npt.NDArray[Any]
) -> Tensor:
    """Return the float32 tensor of such parts, which are on the CPU and contiguous."""
    lower = rest.reshape(-1).numpy().view(np.uint16)
    upper = upper_half(values.reshape(-1), lower)
    # Indices are unique, so each correction is added once.
    upper[exceptions] += corrections
    bits = np.empty(2 * len(lower), np.uint16)
    bits[0::2], bits[1::2] = lower, upper
    return torch.from_numpy(bits.view(np.int32)).view(torch.float32).reshape(values.shape)


def upper_half(values: Tensor, lower: Halves) -> Halves:
    """Return the upper half of the bits of elements that were rounded to ``values``; of an exception, another."""
    # A lower half above the tie was rounded up, which carried 1 into the upper half: it is taken back.
    found: Halves = values.view(torch.int16).numpy().view(np.uint16) - (lower > _TIE)
    return found
