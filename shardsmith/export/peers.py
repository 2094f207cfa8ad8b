"""Tensors that go from one rank to another, in a background thread, over a Gloo group that nothing else uses."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Peers:
    """The other ranks. What one sends another must receive, in the same order; different pairs are independent.

    With a rank that does not answer nothing is exchanged any more; the rest goes on. Used by one thread.

    Attributes:
        lost: Those ranks, and why.
    """

    def __init__(self, process_group: dist.ProcessGroup | None, rank: int, size: int) -> None:
        """``process_group`` holds all ranks and is of Gloo; None with a single rank."""
        self.rank = rank
        self.lost: dict[int, RuntimeError] = {}
        self.others = [other for other in range(size) if other != rank]
        self._group = process_group
        self._sending: list[tuple[int, Any, Tensor]] = []

    def send(self, values: Tensor, rank: int) -> None:
        """Begin to send a contiguous CPU tensor; it must not change before ``flush``. Nothing is copied."""
        if rank not in self.lost:
            # Kept until ``flush``: Gloo reads this memory in its own thread.
            data = _as_bytes(values)
            try:
                self._sending.append((rank, dist.isend(data, rank, group=self._group), data))
            except RuntimeError as error:
                self.lost[rank] = error

    def flush(self) -> None:
        """Return when all that was sent is received, or its receiver lost."""
        # First forget them: a second ``flush`` must not wait again for what has failed.
        sending, self._sending = self._sending, []
        for rank, sent, _ in sending:
            try:
                sent.wait()
            except RuntimeError as error:
                self.lost.setdefault(rank, error)

    def receive(self, out: Tensor, rank: int) -> bool:
        """Fill a contiguous CPU tensor with what ``rank`` sends next; False if that rank is lost."""
        if rank not in self.lost:
            try:
                # ``recv`` waits up to the group's timeout; from then on this rank counts as lost.
                dist.recv(_as_bytes(out), rank, group=self._group)
            except RuntimeError as error:
                self.lost[rank] = error
        return rank not in self.lost

    def send_json(self, value: Any, rank: int) -> None:
        """As ``send``."""
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        # The length first: the receiver has to make memory of that size.
        self.send(torch.tensor([len(text)], device="cpu"), rank)
        self.send(text, rank)

    def receive_json(self, rank: int) -> Any:
        """Return what ``send_json`` of that rank sent; None if it is lost."""
        length = torch.zeros(1, dtype=torch.int64, device="cpu")
        if not self.receive(length, rank):
            return None
        text = torch.empty(int(length), dtype=torch.uint8, device="cpu")
        return json.loads(text.numpy().tobytes()) if self.receive(text, rank) else None


def _as_bytes(values: Tensor) -> Tensor:
    # As bytes, whatever the dtype: Gloo does not know all of them.
    return values.view(-1).view(torch.uint8)
