"""Hypothesis strategies for what the formats must carry: tensors of every dtype and shape, and ways to cut them up."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from shardsmith.tensors.tensors import Chunk, Shape, TensorSpec

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.uint16,
    torch.int16,
    torch.uint32,
    torch.int32,
    torch.uint64,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
    torch.float4_e2m1fn_x2,
]


def random_tensor(shape: Shape, dtype: torch.dtype, seed: int) -> Tensor:
    """A contiguous tensor of random bytes."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return (values & 1 if dtype == torch.bool else values).view(dtype).reshape(shape)


def raw_bytes(tensor: Tensor) -> bytes:
    """The bytes of a tensor in row-major order."""
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def spec_of(name: str, tensor: Tensor) -> TensorSpec:
    """What describes this tensor."""
    return TensorSpec(name, tuple(tensor.shape), tensor.dtype)


@st.composite
def tensors(draw: st.DrawFn, max_size: int = 5) -> Tensor:
    """A tensor of 0 to 4 dimensions, now and then empty."""
    dtype = draw(st.sampled_from(DTYPES))
    least = 1 if dtype == torch.float4_e2m1fn_x2 else 0
    shape = draw(st.lists(st.integers(0, max_size), min_size=least, max_size=4))
    return random_tensor(tuple(shape), dtype, draw(st.integers(0, 2**32)))


@st.composite
def partitions(draw: st.DrawFn, shape: Shape) -> list[Chunk]:
    """Boxes that cover a tensor exactly, in any order; some may be empty."""
    boxes = [Chunk.whole(shape)]
    for _ in range(draw(st.integers(0, 6)) if shape else 0):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        boxes += _cut(box, dim, draw(st.integers(0, box.sizes[dim])))
    return draw(st.permutations(boxes))


def _cut(box: Chunk, dim: int, at: int) -> list[Chunk]:
    rest = box.sizes[dim] - at
    left = Chunk(box.offsets, (*box.sizes[:dim], at, *box.sizes[dim + 1 :]))
    begin = box.offsets[dim] + at
    offsets = (*box.offsets[:dim], begin, *box.offsets[dim + 1 :])
    return [left, Chunk(offsets, (*box.sizes[:dim], rest, *box.sizes[dim + 1 :]))]
