"""Filling a planned safetensors file: any slice of any tensor, in any order, by any number of writers at once."""

from __future__ import annotations

import contextlib
import errno
import itertools
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from shardsmith.errors import TargetExistsError, UsageError, WriteError
from shardsmith.formats.safetensors_files.header import TensorPlacement
from shardsmith.formats.safetensors_files.plan import FilePlan
from shardsmith.ground.commit import writing
from shardsmith.ground.file_tensor import FileTensor
from shardsmith.ground.mapped import MappedFile
from shardsmith.ground.memory import as_integers, memory_of
from shardsmith.tensors.tensors import Chunk, Shape, row_major_blocks

_OPEN_FLAGS = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
_BLOCK_BYTES = 32 << 20  # the most that is copied at a time of a tensor that is not contiguous


class SafetensorsFileWriter:
    """A planned file, open for positioned writes. Threads may share it; other processes open the file themselves, or
    get a ``duplicate``.

    Nothing here stops two writers from writing the same elements, or all of them from leaving some out: whoever deals
    out the boxes verifies that they cover each tensor exactly.

    Attributes:
        path: The file.
        plan: What goes where in it.
    """

    def __init__(self, path: Path, plan: FilePlan, descriptor: int) -> None:
        """``descriptor`` is that of the file, open to read and write; from now on this object's to close."""
        self.path = path
        self.plan = plan
        self._descriptor = descriptor

    @classmethod
    def create(cls, directory: Path, plan: FilePlan) -> Self:
        """Make the file at its full size and write its header. Its mode is 0666 less the umask.

        It is sparse: ``commit.require_space`` tells beforehand whether all of a directory fits.

        Raises:
            TargetExistsError: there is something of that name, be it a dangling link.
            WriteError: any other failure. What was made is left there.
        """
        path = directory / plan.name
        with writing(path, f"making a file of {plan.size} bytes"), contextlib.ExitStack() as undo:
            if path.parent != directory:  # of a module with a folder of its own
                path.parent.mkdir(exist_ok=True)
            descriptor = _open_new(path)
            undo.callback(os.close, descriptor)
            # At full size from the start: ranks write at any offset in any order, and open_existing compares the size.
            os.ftruncate(descriptor, plan.size)
            _write_at(descriptor, memoryview(plan.header), 0)
            undo.pop_all()
        return cls(path, plan, descriptor)

    @classmethod
    def open_existing(cls, directory: Path, plan: FilePlan) -> Self:
        """Open the file that another process has created from the same plan.

        Raises:
            WriteError: it is not there, is no regular file, or was created from another plan.
        """
        path = directory / plan.name
        with writing(path, "opening"), contextlib.ExitStack() as undo:
            descriptor = os.open(path, _OPEN_FLAGS | os.O_NONBLOCK)  # so that a pipe does not block
            undo.callback(os.close, descriptor)
            _check_planned(path, descriptor, plan)
            undo.pop_all()
        return cls(path, plan, descriptor)

    def write_run(self, name: str, first_element: int, values: Tensor) -> None:
        """Write consecutive elements of a tensor, from a flat row-major index on.

        Args:
            name: Name of the tensor.
            first_element: Row-major index of the first element in the global tensor.
            values: CPU tensor of the planned dtype and any shape, in whose row-major order the elements are written;
                straight from its memory where that is contiguous.

        Raises:
            UsageError: the values do not fit the plan; nothing was written.
            WriteError: a write failed; some of the values may have been written.
        """
        placement = self._placement(name, values)
        if not 0 <= first_element <= placement.spec.numel - values.numel():
            raise UsageError(f"{name}: {values.numel()} elements from {first_element} on do not fit {placement.spec}")
        begin = placement.begin + first_element * values.dtype.itemsize
        with writing(self.path, f"writing {name}"):
            for first, _, block in _contiguous_blocks(values):
                _write_at(self._descriptor, memory_of(block), begin + first * block.itemsize)

    def write_bytes(self, name: str, first_byte: int, memory: memoryview) -> None:
        """Write consecutive bytes of a tensor, from one of its bytes on.

        Raises:
            UsageError: they do not fit the plan; nothing was written.
            WriteError: the write failed; some of them may have been written.
        """
        placement = self.plan.tensors[name]
        if not 0 <= first_byte <= placement.spec.nbytes - len(memory):
            raise UsageError(f"{name}: {len(memory)} bytes from {first_byte} on do not fit {placement.spec}")
        with writing(self.path, f"writing {name}"):
            _write_at(self._descriptor, memory, placement.begin + first_byte)

    def write_box(self, name: str, box: Chunk, values: Tensor, shape: Shape | None = None) -> None:
        """Write a box of a tensor, with one system call for each run of elements that is contiguous in the file.

        Args:
            name: Name of the tensor.
            box: The box of the tensor that ``values`` fill.
            values: CPU tensor of shape ``box.sizes`` and the planned dtype, with any strides.
            shape: Of the tensor that the box is in: it has the planned elements in the same row-major order. None: the
                planned one.

        Raises:
            UsageError: the values or the box do not fit the plan; nothing was written.
            WriteError: a write failed; some of the values may have been written.
        """
        placement = self._placement(name, values)
        shape = placement.spec.shape if shape is None else shape
        # Every check comes before the first write, so that a wrong call changes nothing in the file.
        inside = len(box.offsets) == len(box.sizes) == len(shape) and all(
            0 <= offset <= extent - size for offset, size, extent in zip(box.offsets, box.sizes, shape, strict=True)
        )
        if not inside or tuple(values.shape) != box.sizes or math.prod(shape) != placement.spec.numel:
            found = f"values of shape {tuple(values.shape)} for {box} in {shape}"
            raise UsageError(f"{name}: {found} do not fit {placement.spec}")
        with writing(self.path, f"writing {name}"):
            for _, part, block in _contiguous_blocks(values):
                offsets = tuple(map(sum, zip(box.offsets, part.offsets, strict=True)))
                self._write_block(placement, shape, Chunk(offsets, part.sizes), block)

    def stored(self, name: str, shape: Shape | None = None) -> FileTensor:
        """Return what the file holds of a tensor now, in another shape of as many elements if one is given.

        Reading it raises CheckpointError if it cannot be read.
        """
        placement = self.plan.tensors[name]
        with writing(self.path, "reading what was written"):
            file = MappedFile.of_descriptor(self.path, self._descriptor)
        shape = placement.spec.shape if shape is None else shape
        return FileTensor.contiguous(file, placement.begin, shape, placement.spec.dtype)

    def duplicate(self) -> int:
        """Return another descriptor of the open file, which the caller closes. Raises WriteError."""
        with writing(self.path, "duplicating its descriptor"):
            return os.dup(self._descriptor)

    def sync(self) -> None:
        """Return when all that was written is on the disk. Raises WriteError."""
        with writing(self.path, "fsync"):
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file, without ``sync``. Does nothing the second time. Raises WriteError."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with writing(self.path, "closing"):
                os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _placement(self, name: str, values: Tensor) -> TensorPlacement:
        placement = self.plan.tensors.get(name)
        if placement is None:
            raise UsageError(f"{self.path} was planned without a tensor named {name!r}")
        if values.dtype != placement.spec.dtype or values.device.type != "cpu" or values.layout != torch.strided:
            found = f"{values.dtype} {values.layout} on {values.device}"
            raise UsageError(f"{name}: planned as {placement.spec.dtype} from the CPU, not {found}")
        return placement

    def _write_block(self, placement: TensorPlacement, shape: Shape, box: Chunk, block: Tensor) -> None:
        memory = memory_of(block)
        length, firsts = _contiguous_runs(shape, box)
        length *= block.itemsize
        for begin, first in zip(range(0, len(memory), length), firsts, strict=True):
            offset = placement.begin + first * block.itemsize
            _write_at(self._descriptor, memory[begin : begin + length], offset)


def _open_new(path: Path) -> int:
    try:
        return os.open(path, _OPEN_FLAGS | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        raise TargetExistsError(path, "exists already; files are only written under new names") from None


def _check_planned(path: Path, descriptor: int, plan: FilePlan) -> None:
    # fstat of the open file, not stat of the path: the path may name another file by now.
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        raise WriteError(f"{path}: is not a regular file")
    if found.st_size != plan.size or os.pread(descriptor, len(plan.header), 0) != plan.header:
        raise WriteError(f"{path}: was made from another plan; the ranks disagree about the tensors")


def _write_at(descriptor: int, memory: memoryview, offset: int) -> None:
    """Write all of it, however little the system takes at a time. Python itself repeats interrupted calls."""
    # pwrite may take less than it is given: on Linux at most 2 GiB - 4 KiB per call.
    while memory:
        written = os.pwrite(descriptor, memory, offset)
        if written == 0:
            raise OSError(errno.EIO, "the system accepts no more bytes and does not say why")
        memory = memory[written:]
        offset += written


def _contiguous_blocks(values: Tensor) -> Iterator[tuple[int, Chunk, Tensor]]:
    """The parts of a tensor in row-major order, contiguous and as plain integers of the same size.

    Yields the flat index of the first element, the place in ``values``, and the part: a view, or else a copy.
    """
    bits = as_integers(values)
    whole = Chunk.whole(tuple(bits.shape))
    for first, part in row_major_blocks(whole.sizes, _BLOCK_BYTES // bits.itemsize):
        yield first, part, bits[part.within(whole)].contiguous()


def _contiguous_runs(shape: Shape, box: Chunk) -> tuple[int, Iterator[int]]:
    """How a box that is not empty lies in a row-major tensor: elements per run, and the flat index of each run."""
    # The innermost dimension that the box does not fill: from there on inward its elements are one run.
    depth = next((d for d in reversed(range(len(shape))) if box.sizes[d] != shape[d]), 0)
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    first = sum(offset * stride for offset, stride in zip(box.offsets, strides, strict=True))
    steps = [range(0, size * stride, stride) for size, stride in zip(box.sizes[:depth], strides, strict=False)]
    return math.prod(box.sizes[depth:]), (first + sum(step) for step in itertools.product(*steps))
