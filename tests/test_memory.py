from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shardsmith.memory import same_bits


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.int64])
def test_one_bit_makes_a_difference_wherever_it_is(dtype: torch.dtype, contiguous: bool) -> None:
    bits = torch.arange(64 * 8, dtype=torch.int64).view(torch.uint8).reshape(64, 64) % 2
    one = bits.view(dtype) if contiguous else bits.view(dtype).t()
    for place in ((0, 0), (63, 63), (20, 9)):
        other = bits.clone()
        assert same_bits(one, like(one, other, dtype))
        other[place] ^= 1
        assert not same_bits(one, like(one, other, dtype))


def like(one: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    return bits.view(dtype) if one.is_contiguous() else bits.view(dtype).t().contiguous()


def test_bits_are_compared_and_not_numbers() -> None:
    nan = torch.tensor([float("nan")])
    assert same_bits(nan, nan.clone())
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert same_bits(torch.empty(0), torch.empty(0))
