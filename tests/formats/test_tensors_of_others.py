"""Tensors that are made of others, as the quantised weights of torchao: the error says so, and not that bytes are lost.

What torchao 0.18 writes was tried by hand; the class here is one of that kind.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shardsmith.errors import UnsupportedFormatError
from shardsmith.formats.by_path import open_source
from shardsmith.tensors.tensors import read_tensor
from tests.dcp_directories import save


class Bytes(Tensor):
    """Plays a tensor of float32, and holds whole numbers of one byte."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Bytes:
        made: Bytes = Tensor._make_wrapper_subclass(cls, held.shape, dtype=torch.float32)  # type: ignore[attr-defined]
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return False if "is_pinned" in str(func) else cls(args[0].held)  # else of a save: detach, clone, and so on


@pytest.mark.parametrize("size", [2, 200])  # more bytes than the values have that it plays, and fewer
def test_a_checkpoint_with_such_a_tensor_is_not_called_damaged(size: int, tmp_path: Path) -> None:
    save({"plain": torch.ones(3), "weight": Bytes(torch.ones(size, size, dtype=torch.int8))}, tmp_path)
    with pytest.raises(UnsupportedFormatError, match=r"others\.Bytes, which is made of others; .* v\.dequantize\(\)"):
        read_tensor(open_source(tmp_path), "weight")


def test_a_file_with_such_a_tensor_is_not_called_unsafe(tmp_path: Path) -> None:
    torch.save({"model": {"weight": Bytes(torch.ones(2, 2, dtype=torch.int8))}}, tmp_path / "model.pt")
    with pytest.raises(UnsupportedFormatError, match=r"others\.Bytes, which is made of others; .* v\.dequantize\(\)"):
        open_source(tmp_path / "model.pt")
