"""Copies from a device in windows. What needs streams is in tests/gpu; here the device is the CPU, which has none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from shardsmith.tensors import device_copy
from shardsmith.tensors.device_copy import copy_to_host, windows
from tests.gpu.tensors import is_same

_LINE = 64


class NoStream:
    """A stream of a device that does everything at once."""

    def __init__(self, device: Any = None) -> None:
        self.device = device

    def wait_stream(self, other: NoStream) -> None:
        assert isinstance(other, NoStream)

    def wait_event(self, event: object) -> None:
        assert event is not None

    def record_event(self) -> object:
        return object()

    def synchronize(self) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc: object) -> None:
        pass


@pytest.fixture(autouse=True)
def streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "Stream", NoStream)
    monkeypatch.setattr(torch.accelerator, "current_stream", NoStream)


@pytest.fixture(params=[1, 2, 3])
def tensors(request: pytest.FixtureRequest) -> list[Tensor]:
    """Of many shapes, dtypes and strides, some larger than a window."""
    generator = torch.Generator().manual_seed(request.param)
    found = [torch.randn(shape, generator=generator) for shape in [(), (0, 3), (7,), (40, 33), (2, 3, 500), (3000,)]]
    found += [torch.randn(90, 41, generator=generator).t(), torch.arange(12345), torch.arange(999) % 2 == 0]
    found += [torch.randn(513, generator=generator).to(torch.float8_e4m3fn)]
    found += [torch.randn(i % 5, 3, generator=generator) for i in range(100)]
    return [found[i] for i in torch.randperm(len(found), generator=generator).tolist()]


def room_for(tensors: list[Tensor], cast: torch.dtype) -> list[Tensor]:
    """As a staging buffer has it: each at a multiple of 64 bytes of one memory."""
    dtypes = [cast if tensor.dtype == torch.float32 else tensor.dtype for tensor in tensors]
    ends = [0]
    for tensor, dtype in zip(tensors, dtypes, strict=True):
        ends.append(ends[-1] + -(-tensor.numel() * dtype.itemsize // _LINE) * _LINE)
    memory = torch.full((ends[-1],), 0xAB, dtype=torch.uint8)
    return [
        memory[begin : begin + tensor.numel() * dtype.itemsize].view(dtype).view(tensor.shape)
        for tensor, dtype, begin in zip(tensors, dtypes, ends, strict=False)
    ]


@pytest.mark.parametrize("window_bytes", [512, 4096, 1 << 20])
@pytest.mark.parametrize("cast", [torch.float32, torch.bfloat16], ids=str)
def test_copies_are_the_tensors_cast(tensors: list[Tensor], cast: torch.dtype, window_bytes: int) -> None:
    copies = room_for(tensors, cast)
    copy_to_host(tensors, copies, window_bytes)
    for tensor, copy in zip(tensors, copies, strict=True):
        assert is_same(copy, tensor.to(copy.dtype))


def test_memory_of_others_between_the_copies_is_left_alone(tensors: list[Tensor]) -> None:
    copies = room_for(tensors, torch.float32)
    others = [copy.reshape(-1).view(torch.uint8) for copy in copies[1::2]]
    kept = [other.clone() for other in others]
    copy_to_host(tensors[::2], copies[::2], 2048)
    assert all(torch.equal(other, before) for other, before in zip(others, kept, strict=True))


@pytest.mark.parametrize("most_bytes", [256, 1000, 10_000])
def test_a_window_is_never_larger_than_asked_for(tensors: list[Tensor], most_bytes: int) -> None:
    pairs = [(t, copy) for t, copy in zip(tensors, room_for(tensors, torch.bfloat16), strict=True) if t.numel()]
    found = [*windows(pairs, most_bytes)]
    assert all(window.end - window.base <= most_bytes for window in found)
    assert sum(piece.source.numel() for window in found for piece in window.pieces) == sum(t.numel() for t in tensors)


def test_the_casts_take_no_more_than_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor, copy = torch.randn(1 << 18), torch.empty(1 << 18, dtype=torch.bfloat16)
    taken: list[int] = []
    empty = torch.empty

    def counted(*shape: Any, **options: Any) -> Tensor:
        made = empty(*shape, **options)
        taken.append(made.nbytes)
        return made

    monkeypatch.setattr(torch, "empty", counted)
    copy_to_host([tensor], [copy], 1 << 16)
    assert torch.equal(copy, tensor.bfloat16())
    assert (1 << 15) < sum(taken) <= 1 << 16


def test_an_error_is_raised_when_all_that_was_begun_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[object] = []
    monkeypatch.setattr(NoStream, "synchronize", lambda stream: waited.append(stream))
    tensors, copies = [torch.randn(9), torch.empty(9, device="meta")], [torch.empty(9), torch.empty(9)]
    with pytest.raises(NotImplementedError):
        copy_to_host(tensors, copies)
    assert len(waited) == 4
    assert device_copy.WINDOW_BYTES <= 256 << 20
