"""bfloat16 values and a rest of two bytes an element are a float32 tensor, whatever bits it has."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from shardsmith.tensors.rounded import Rounded, put_together, round_off

UPPER = np.arange(1 << 16, dtype=np.uint32) << 16
LOWER = [0, 1, 2, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0x8002, 0xFFFE, 0xFFFF, 0x1234, 0xC0DE]
"""Around zero, the tie, and the next number; with each upper half, so with each sign, exponent, infinity and NaN."""


def of_bits(bits: np.ndarray) -> Tensor:
    return torch.from_numpy(bits.view(np.int32)).view(torch.float32)


def together(parts: Rounded) -> Tensor:
    return put_together(parts.values, parts.rest, parts.exceptions, parts.corrections)


def assert_bits_equal(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    assert torch.equal(found.contiguous().view(torch.int32), wanted.contiguous().view(torch.int32))


@pytest.mark.parametrize("lower", LOWER)
def test_every_upper_half_comes_back_with_lower_halves_around_each_edge(lower: int) -> None:
    tensor = of_bits(UPPER | lower)
    parts = round_off(tensor)
    assert_bits_equal(parts.values.float(), tensor.to(torch.bfloat16).float())
    assert_bits_equal(together(parts), tensor)


def test_every_lower_half_comes_back_with_any_upper_half() -> None:
    generator = np.random.default_rng(0)
    lower = np.arange(1 << 16, dtype=np.uint32)
    for _ in range(32):
        tensor = of_bits(generator.permutation(UPPER) | lower)
        assert_bits_equal(together(round_off(tensor)), tensor)


def test_exceptions_are_ties_that_went_up_and_numbers_that_are_none() -> None:
    tensor = of_bits(UPPER | 0x8000)
    exceptions = round_off(tensor).exceptions
    upper = UPPER[exceptions] >> 16
    is_nan = torch.isnan(tensor).numpy()[exceptions]
    assert (upper[~is_nan] % 2 == 1).all()
    assert (~is_nan).sum() == (1 << 15) - 2 * (1 << 6)  # all odd ones but those of NaN
    usual = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    assert len(round_off(usual).exceptions) < 32


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (2, 3, 4)])
def test_shapes_and_strides(shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape)
    for one in (tensor, tensor.mT if tensor.ndim > 1 else tensor, tensor.expand(2, *shape)):
        assert_bits_equal(together(round_off(one)), one)


def test_one_element_of_a_turned_tensor() -> None:
    element = torch.randn(7, 5).t()[1:2, 3:4]
    assert_bits_equal(together(round_off(element)), element)
