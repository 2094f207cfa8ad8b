"""A planned safetensors file that goes into an object store, front to back: stores do not write in the middle."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from shardsmith.errors import UsageError
from shardsmith.formats.safetensors_files.header import TensorPlacement
from shardsmith.formats.safetensors_files.plan import FilePlan
from shardsmith.ground.commit import writing
from shardsmith.ground.memory import as_integers, memory_of
from shardsmith.ground.new_file import new_file
from shardsmith.ground.remote_export import ClaimedDirectory, require_claim
from shardsmith.tensors.tensors import Chunk, Shape


class SafetensorsUpload:
    """A planned file on its way into a store: as ``SafetensorsFileWriter``, with tensors in the order of the plan.

    Boxes of one tensor may come in any order; they are collected in memory until the next tensor begins. Runs of
    elements that go on where the last one ended are not. One thread.

    Attributes:
        path: The object.
        plan: What goes where in it.
    """

    def __init__(self, directory: ClaimedDirectory, plan: FilePlan) -> None:
        """Raises WriteError."""
        self.plan = plan
        self.path = directory / plan.name
        self._directory = directory
        self._current: TensorPlacement | None = None
        self._collected: Tensor | None = None
        self._written = 0
        with writing(self.path, "beginning an upload"):
            self._file = new_file(self.path, plan.size)
        self._append(memoryview(plan.header))

    def write_run(self, name: str, first_element: int, values: Tensor) -> None:
        """Write consecutive elements of a tensor. Raises UsageError, WriteError."""
        placement = self._begin(name)
        bits = as_integers(values.contiguous()).view(-1)
        # The run goes on where the last one ended: it is sent on without being held in memory.
        if self._collected is None and self._written == placement.begin + first_element * bits.itemsize:
            self._append(memory_of(bits))
        else:
            self._collect(placement)[first_element : first_element + bits.numel()] = bits

    def write_box(self, name: str, box: Chunk, values: Tensor, shape: Shape | None = None) -> None:
        """Write a box of a tensor, which may be seen in another shape. Raises UsageError, WriteError."""
        placement = self._begin(name)
        shape = placement.spec.shape if shape is None else shape
        if values.numel():
            whole = Chunk.whole(tuple(shape))
            self._collect(placement).view(shape)[box.within(whole)] = as_integers(values)

    def sync(self) -> None:
        """Make the object visible, complete. Raises UsageError, WriteError, TargetExistsError."""
        self._end()
        if self._written != self.plan.size:
            raise UsageError(f"{self.path}: {self._written} bytes were written of {self.plan.size}")
        with writing(self.path, "upload"):
            # A job that was paused may come back when another has claimed its target: then it must not publish.
            require_claim(self._directory, self._directory.attempt)
            self._file.finish()

    def close(self) -> None:
        """Let go of it; without ``sync`` before, nothing of it appears. Any number of calls."""
        self._collected = None
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _begin(self, name: str) -> TensorPlacement:
        """Go on to a tensor, unless it is the one that is being written."""
        placement = self.plan.tensors[name]
        # Tensors come in the order of the plan, so the one before is complete now.
        if placement is not self._current:
            self._end()
            if self._written != placement.begin:
                raise UsageError(f"{self.path}: {name} begins at byte {placement.begin}, not at {self._written}")
            self._current = placement
        return placement

    def _end(self) -> None:
        if self._collected is not None:
            collected, self._collected = self._collected, None
            self._append(memory_of(collected))
        self._current = None

    def _collect(self, placement: TensorPlacement) -> Tensor:
        if self._collected is None:
            if self._written != placement.begin:
                raise UsageError(f"{self.path}: {placement.spec.name} was not written front to back")
            empty = torch.empty(placement.spec.numel, dtype=placement.spec.dtype, device="cpu")
            self._collected = as_integers(empty)
        return self._collected

    def _append(self, memory: memoryview) -> None:
        with writing(self.path, "upload"):
            self._file.write(memory)
        self._written += len(memory)
