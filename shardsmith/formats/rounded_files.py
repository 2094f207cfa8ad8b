"""float32 tensors that are the bfloat16 weights of a Hugging Face directory, and a rest that lies beside them.

model.safetensors                          bfloat16
float32-rest/model.safetensors             int16, under the same names: the lower half of the bits
float32-rest/exceptions-<rank>.safetensors elements of which the two do not tell all, where there are any
"""

from __future__ import annotations

import contextlib
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shardsmith.errors import CorruptCheckpointError
from shardsmith.formats.safetensors_files.plan import plan_files
from shardsmith.formats.safetensors_files.source import SafetensorsSource, open_safetensors_directory
from shardsmith.formats.safetensors_files.writer import SafetensorsFileWriter
from shardsmith.ground.layout import REST_FOLDER
from shardsmith.tensors.rounded import Rounded, put_together
from shardsmith.tensors.tensors import Chunk, Shape, TensorSource, TensorSpec, read_into, read_tensor

_FILE = re.compile(r"exceptions-(0|[1-9][0-9]*)\.safetensors")
_AT, _BY = ":at", ":by"
"""Ends of the names, after that of the tensor: the indices, as differences, and what is added to the upper halves."""
_Indices = npt.NDArray[np.int64]
_Corrections = npt.NDArray[np.uint16]


def exceptions_file(rank: int) -> str:
    """Return the name of a rank's file of exceptions."""
    return f"exceptions-{rank}.safetensors"


class Exceptions:
    """What one rank finds of them in the boxes that it writes."""

    def __init__(self) -> None:
        self._found: dict[str, list[tuple[_Indices, _Corrections]]] = {}

    def add(self, name: str, box: Chunk, shape: Shape, parts: Rounded) -> None:
        """Take those of a box of a tensor of this shape."""
        if len(parts.exceptions):
            indices = _outer(parts.exceptions, box, Chunk.whole(shape))
            self._found.setdefault(name, []).append((indices, parts.corrections))

    def write(self, directory: Path, rank: int) -> None:
        """Write and fsync them, if there are any. Raises WriteError."""
        packed: dict[str, Tensor] = {}
        for name, found in self._found.items():
            indices, corrections = (np.concatenate(part) for part in zip(*found, strict=True))
            # Boxes come in any order; sorted indices have small differences, which zlib packs well.
            order = np.argsort(indices, kind="stable")
            steps = np.diff(indices[order], prepend=0)
            packed[name + _AT], packed[name + _BY] = _pack(steps), _pack(corrections[order])
        specs = [TensorSpec(name, tuple(data.shape), data.dtype) for name, data in packed.items()]
        # One file: without a limit plan_files makes no more. Without exceptions there is none at all.
        for plan in plan_files(specs, exceptions_file(rank).removesuffix(".safetensors")).files if specs else ():
            with contextlib.closing(SafetensorsFileWriter.create(directory, plan)) as file:
                for name, data in packed.items():
                    file.write_run(name, 0, data)
                file.sync()


class RoundedSource:
    """The tensors of a directory of such files (a ``TensorSource``); what has no rest is as it is in the files."""

    def __init__(self, directory: Path, stem: str) -> None:
        """Open all files. Raises CheckpointError."""
        self.path = directory
        with contextlib.ExitStack() as opened:
            self._files: TensorSource = open_safetensors_directory(directory, stem)
            opened.callback(self._files.close)
            self._rest: TensorSource = open_safetensors_directory(directory / REST_FOLDER, stem)
            opened.callback(self._rest.close)
            self.specs: Mapping[str, TensorSpec] = {
                name: self._spec(name, spec) for name, spec in self._files.specs.items()
            }
            if strange := sorted(self._rest.specs.keys() - self.specs.keys()):
                raise CorruptCheckpointError(directory, f"has a rest of {strange[0]}, which is not in its files")
            self._exceptions = _read_exceptions(directory / REST_FOLDER, self._rest.specs)
            self._opened = opened.pop_all()

    def pieces(self, name: str, box: Chunk) -> Iterator[tuple[Chunk, Tensor]]:
        """As ``TensorSource.pieces``."""
        if name not in self._rest.specs:
            yield from self._files.pieces(name, box)
            return
        values, rest = (torch.empty(box.sizes, dtype=t, device="cpu") for t in (torch.bfloat16, torch.int16))
        read_into(self._files, name, box, values)
        read_into(self._rest, name, box, rest)
        yield box, put_together(values, rest, *self._exceptions_in(name, box))

    def close(self) -> None:
        """Close the files. Tensors that were read stay valid."""
        self._opened.close()

    def _spec(self, name: str, spec: TensorSpec) -> TensorSpec:
        rest = self._rest.specs.get(name)
        if rest is None:
            return spec
        if (rest.shape, rest.dtype, spec.dtype) != (spec.shape, torch.int16, torch.bfloat16):
            raise CorruptCheckpointError(self.path, f"{name}: {spec} has a rest that is {rest}")
        return TensorSpec(name, spec.shape, torch.float32)

    def _exceptions_in(self, name: str, box: Chunk) -> tuple[_Indices, _Corrections]:
        indices, corrections = self._exceptions.get(name, (np.empty(0, np.int64), np.empty(0, np.uint16)))
        return _inner(indices, corrections, box, Chunk.whole(self.specs[name].shape))


def _outer(indices: _Indices, box: Chunk, whole: Chunk) -> _Indices:
    """Row-major indices in a tensor, of those in a box of it."""
    found = np.zeros(len(indices), np.int64)
    stride = 1
    for offset, size, extent in zip(*(reversed(one) for one in (box.offsets, box.sizes, whole.sizes)), strict=True):
        # From the last dimension outward: the remainder is the index in it, the quotient goes on to the next.
        indices, at = np.divmod(indices, size)
        found += (at + offset) * stride
        stride *= extent
    return found


def _inner(indices: _Indices, corrections: _Corrections, box: Chunk, whole: Chunk) -> tuple[_Indices, _Corrections]:
    """The inverse of ``_outer``, of what lies in the box."""
    if box != whole:  # indices are sorted, and a box lies between its first and its last element
        corners = _outer(np.array([0, max(0, box.numel - 1)]), box, whole)
        first, end = np.searchsorted(indices, [corners[0], corners[1] + 1])
        indices, corrections = indices[first:end], corrections[first:end]
    found, is_inside, left, stride = np.zeros(len(indices), np.int64), np.ones(len(indices), bool), indices, 1
    for offset, size, extent in zip(*(reversed(one) for one in (box.offsets, box.sizes, whole.sizes)), strict=True):
        left, at = np.divmod(left, extent)
        # A box that is not one run has elements of others between its first and its last one.
        is_inside &= (at >= offset) & (at < offset + size)
        found += (at - offset) * stride
        stride *= size
    return found[is_inside], corrections[is_inside]


def _read_exceptions(folder: Path, specs: Mapping[str, TensorSpec]) -> dict[str, tuple[_Indices, _Corrections]]:
    """Of all ranks, by tensor, sorted. Raises CheckpointError."""
    found: dict[str, list[tuple[_Indices, _Corrections]]] = {}
    for path in sorted(path for path in folder.iterdir() if _FILE.fullmatch(path.name)):
        with contextlib.closing(SafetensorsSource(path)) as source:
            for name in (one.removesuffix(_AT) for one in source.specs if one.endswith(_AT)):
                # Bounds what is decompressed: 8 and 2 bytes for each element at most; none for an unknown tensor.
                most = specs[name].numel if name in specs else 0
                steps: _Indices = np.frombuffer(_unpack(source, name + _AT, most, 8), np.int64)
                corrections: _Corrections = np.frombuffer(_unpack(source, name + _BY, most, 2), np.uint16)
                indices = np.cumsum(steps)
                # A sum that is too large for int64 becomes negative first.
                is_sorted = (steps >= 0).all() and (indices >= 0).all()
                if len(indices) != len(corrections) or not is_sorted or indices[-1:].sum() >= max(most, 1):
                    raise CorruptCheckpointError(path, f"{name}: its exceptions are none of such a tensor")
                found.setdefault(name, []).append((indices, corrections))
    return {name: _joined(parts) for name, parts in found.items()}


def _joined(parts: list[tuple[_Indices, _Corrections]]) -> tuple[_Indices, _Corrections]:
    indices, corrections = (np.concatenate(part) for part in zip(*parts, strict=True))
    order = np.argsort(indices, kind="stable")
    return indices[order], corrections[order]


def _pack(values: npt.NDArray[np.int64] | npt.NDArray[np.uint16]) -> Tensor:
    return torch.frombuffer(bytearray(zlib.compress(values.tobytes(), 1)), dtype=torch.uint8)


def _unpack(source: SafetensorsSource, name: str, most: int, width: int) -> bytes:
    """Raises CorruptCheckpointError if it is not up to ``most`` numbers of ``width`` bytes, or cannot be read."""
    most *= width
    if name not in source.specs or source.specs[name].dtype != torch.uint8:
        raise CorruptCheckpointError(source.path, f"{name} is missing, or not made of bytes")
    try:
        unpacker = zlib.decompressobj()
        # One byte more than allowed is enough to see that there are too many.
        data = unpacker.decompress(read_tensor(source, name).numpy().tobytes(), most + 1)
    except zlib.error as error:
        raise CorruptCheckpointError(source.path, f"{name} cannot be read: {error}") from error
    if len(data) > most or len(data) % width or not unpacker.eof:
        raise CorruptCheckpointError(source.path, f"{name} is not of such a tensor")
    return data
