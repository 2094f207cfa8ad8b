"""Tensors compared bit by bit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same names, shapes, dtypes and bits; NaN equals itself."""
    assert found.keys() == expected.keys()
    wrong = [name for name, value in expected.items() if not is_same(found[name], value)]
    assert not wrong, f"other values: {', '.join(wrong)}"


def is_same(one: Tensor, other: Tensor) -> bool:
    alike = (one.shape, one.dtype) == (other.shape, other.dtype)
    return alike and torch.equal(*(value.detach().cpu().reshape(-1).view(torch.uint8) for value in (one, other)))
