"""Files of ``torch.save``: single ones, several with an index, and those that each rank wrote of its own shards.

No code of a file is run. Tensors are read box by box wherever the file is a plain zip of plain tensors; what else
torch deems safe is read by ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint

from shardsmith.errors import (
    CorruptCheckpointError,
    IncompleteCheckpointError,
    UnsafeCheckpointError,
    UnsupportedFormatError,
)
from shardsmith.formats.torch_files.archive import DEQUANTIZE, wrapped_class
from shardsmith.formats.torch_files.budget import require_budget
from shardsmith.formats.torch_files.state_pickle import MAX_DEPTH, MAX_STATE_PICKLE_BYTES, read_plain, read_state_pickle
from shardsmith.formats.torch_files.tensor_pickle import UnusualPickleError
from shardsmith.formats.torch_files.zip import TorchZip, UnusualArchiveError
from shardsmith.ground.file_tensor import FileTensor
from shardsmith.ground.mapped import MappedFile
from shardsmith.ground.printable import printable
from shardsmith.tensors.checkpoint_keys import KeyPath, average_above
from shardsmith.tensors.tensors import Chunk, Shape

_MAX_ENTRIES = 1 << 20
_ZIP, _PICKLE = b"PK\3\4", b"\x80\2"
_SHOWN = 5
_ALONE = (
    "if its author is trusted, save the weights alone: torch.save(torch.load(FILE, weights_only=False)[KEY], NEW), "
    "and of a whole module its state_dict()"
)
_FLAT = frozenset({"_flat_param", "flat_param"})


Values = FileTensor | Tensor
"""Both give a tensor for slices; the first reads them then."""


@dataclass(frozen=True, slots=True)
class HeldTensor:
    """One tensor, as far as a file holds it."""

    shape: Shape
    """Global."""
    dtype: torch.dtype
    parts: tuple[tuple[Chunk, Values], ...]
    """Boxes that are not empty, with their values."""
    is_sharded: bool
    """Whether the file says that this is a part of something larger."""


def read_torch_file(path: Path, *, follow_links: bool = False) -> dict[KeyPath, HeldTensor]:
    """All tensors of a ``torch.save`` file by their path in the nested dict that was saved.

    Lists are not looked into, but for those in what is called an average.

    Raises:
        CheckpointNotFoundError: there is no such file.
        UnsafeCheckpointError: it asks for code to be run.
        UnsupportedFormatError: it holds flat parameters of FSDP1, or tensors of a special kind.
        CorruptCheckpointError: it is no such file, or truncated.
    """
    file = MappedFile(path, follow_links=follow_links)
    held = _stored_tensors(file)
    if held is None:
        held = {keys: _plain(path, keys, value) for keys, value in _tensors_in(_load(file), ())}
    # A flat parameter of FSDP1 is a padded piece of several concatenated tensors; the file has none of their shapes.
    if flat := [keys for keys in held if _FLAT & set(str(keys[-1]).split("."))]:
        raise UnsupportedFormatError(
            path,
            f"holds flat parameters ({_joined(flat[0])}), which do not say what they consist of; "
            "save with StateDictType.SHARDED_STATE_DICT, or through torch.distributed.checkpoint",
        )
    return held


def read_torch_object(path: Path) -> Any:
    """Whatever a ``torch.save`` file holds, if torch deems it safe: a scheduler's state, or an optimizer's.

    Raises:
        CheckpointNotFoundError, UnsafeCheckpointError, CorruptCheckpointError: as ``read_torch_file``.
    """
    return _load(MappedFile(path))


def read_plain_value(path: Path, key: str) -> Any:
    """Return what a saved dict has under a key, of numbers, texts, lists and dicts; None where it has it not.

    Of the rest of the file nothing is made: it may hold sharded tensors, which torch refuses.

    Raises:
        CheckpointNotFoundError, UnsafeCheckpointError, CorruptCheckpointError: as ``read_torch_file``.
        UnsupportedFormatError: the file is no zip of torch.save, or the value is something else.
    """
    file = MappedFile(path)
    try:
        data = TorchZip(file, 0, file.size, _MAX_ENTRIES).content("data.pkl", MAX_STATE_PICKLE_BYTES)
        return read_plain(data, path, key)
    except (UnusualArchiveError, UnusualPickleError) as error:
        raise UnsupportedFormatError(path, f"its {key} cannot be read: {error}") from error


def merge_ranks(path: Path, ranks: Sequence[tuple[str, Mapping[KeyPath, HeldTensor]]]) -> dict[KeyPath, MergedTensor]:
    """Return the whole tensors that the files of all ranks make up.

    Args:
        path: The directory, for the errors.
        ranks: Name of each file, and what it holds.

    Raises:
        IncompleteCheckpointError: some tensors have holes. Names all.
        CorruptCheckpointError: the files contradict each other.
        UnsupportedFormatError: they hold parts that do not say where they belong.
    """
    merged: dict[KeyPath, MergedTensor] = {}
    for name, held in ranks:
        for keys, tensor in held.items():
            merged.setdefault(keys, MergedTensor(tensor.shape, tensor.dtype)).add(path, keys, name, tensor)
    # Copies are by box, so replicas do not count twice. Parts that overlap are found when the tensors are opened.
    holes = [line for keys, tensor in merged.items() if (line := tensor.hole(_joined(keys)))]
    if holes:
        raise IncompleteCheckpointError(path, "\n  ".join([f"{len(holes)} tensors are not all there", *holes]))
    return merged


class MergedTensor:
    """A tensor made up of parts, of which replicas are kept to be compared.

    Attributes:
        shape, dtype: Of the whole tensor.
        copies: Box -> its values in each file that has it.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        self.shape = shape
        self.dtype = dtype
        self.copies: dict[Chunk, list[tuple[str, Values]]] = {}

    def add(self, path: Path, keys: KeyPath, file: str, tensor: HeldTensor) -> None:
        """Take in what a file holds of it."""
        if (tensor.shape, tensor.dtype) != (self.shape, self.dtype):
            found = f"{tensor.shape} {tensor.dtype} in {file}, {self.shape} {self.dtype} in another"
            # Plain tensors of different shapes under one key: LOCAL_STATE_DICT, or tensor parallel without DTensor.
            if not tensor.is_sharded and tensor.dtype == self.dtype:
                raise UnsupportedFormatError(
                    path,
                    f"{_joined(keys)}: {found}: these are local parts, and nothing says where they belong; "
                    "save with StateDictType.SHARDED_STATE_DICT, or through torch.distributed.checkpoint",
                )
            raise CorruptCheckpointError(path, f"{_joined(keys)}: {found}; the files are not of one save")
        for box, values in tensor.parts:
            self.copies.setdefault(box, []).append((file, values))

    def hole(self, name: str) -> str | None:
        """Return what is missing, if anything is."""
        whole = Chunk.whole(self.shape).numel
        found = sum(box.numel for box in self.copies)
        return None if found >= whole else f"{name}: {whole - found} of {whole} elements are in no file"


def _stored_tensors(file: MappedFile) -> dict[KeyPath, HeldTensor] | None:
    """The tensors as they lie in the file, or None where the file is not of the usual kind."""
    try:
        archive = TorchZip(file, 0, file.size, _MAX_ENTRIES)
        states = read_state_pickle(archive.content("data.pkl", MAX_STATE_PICKLE_BYTES), file.path)
        return {
            keys: HeldTensor(
                state.shape,
                state.dtype,
                tuple((part.box, archive.tensor(part.record)) for part in state.parts),
                state.is_sharded,
            )
            for keys, state in states.items()
        }
    except (UnusualArchiveError, UnusualPickleError, UnsafeCheckpointError, CorruptCheckpointError):
        return None  # torch knows more kinds, and refuses what is unsafe


def _load(file: MappedFile) -> Any:
    """What torch makes of a file with ``weights_only``: mapped if the file is, and a zip; else all of it in memory."""
    # torch.load would try its legacy readers, tar among them, on a file of any other kind.
    magic = file.bytes(0, min(4, file.size))
    if not magic.startswith((_ZIP, _PICKLE)):
        raise CorruptCheckpointError(file.path, f"begins with {magic!r}, as no file of torch.save does")
    # A budget on what torch is about to build from it.
    require_budget(file.path)
    try:
        return torch.load(file.path, map_location="cpu", weights_only=True, mmap=file.is_mapped and magic == _ZIP)
    except pickle.UnpicklingError as error:
        if (kind := _wrapped_class(file)) is not None:
            raise UnsupportedFormatError(file.path, f"holds {kind}; {DEQUANTIZE}") from error
        kinds = _classes_in(file.path)
        raise UnsafeCheckpointError(
            file.path, f"holds what is not read without running code{kinds}; {_ALONE}"
        ) from error
    except Exception as error:  # a dozen types, RuntimeError and EOFError among them
        fault = f"{type(error).__name__}: {error}".split("\n")[0]
        raise CorruptCheckpointError(file.path, f"is truncated, or no file of torch.save: {fault}") from error


def _classes_in(path: Path) -> str:
    """What a file asks for and torch deems unsafe, as the end of a message; empty where that cannot be told."""
    try:
        names = sorted(map(printable, get_unsafe_globals_in_checkpoint(path)))
    except Exception:  # of a file from before the zip format, or of a pickle that is none
        return ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f": {', '.join(names[:_SHOWN])}{more}" if names else ""


def _wrapped_class(file: MappedFile) -> str | None:
    """As ``wrapped_class``; None for a file that is no plain zip."""
    try:
        return wrapped_class(TorchZip(file, 0, file.size, _MAX_ENTRIES).content("data.pkl", MAX_STATE_PICKLE_BYTES))
    except UnusualArchiveError:
        return None


def _tensors_in(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping) and len(path) <= MAX_DEPTH:
        for key, inner in value.items():
            yield from _tensors_in(inner, (*path, key))
    elif isinstance(value, list) and average_above((*path, 0)) is not None:
        for i, inner in enumerate(value):
            yield from _tensors_in(inner, (*path, i))


def _plain(path: Path, keys: KeyPath, value: Tensor) -> HeldTensor:
    if type(value) not in (Tensor, torch.nn.Parameter) or value.layout != torch.strided or value.is_meta:
        kind = f"{type(value).__name__}, {value.layout}, on {value.device}"
        # Of torchao, where the process has imported it, so that torch could read it.
        cure = f"; {DEQUANTIZE}" if hasattr(value, "tensor_data_names") else ""
        raise UnsupportedFormatError(path, f"{_joined(keys)} is no plain tensor: {kind}{cure}")
    shape = tuple(value.shape)
    parts = ((Chunk.whole(shape), value.detach()),) if value.numel() else ()
    return HeldTensor(shape, value.dtype, parts, is_sharded=False)


def _joined(keys: KeyPath) -> str:
    return ".".join(map(str, keys))
