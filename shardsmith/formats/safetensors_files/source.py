"""Safetensors files as a ``TensorSource``: a single file, or a Hugging Face directory with an index and shards."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from shardsmith.errors import CheckpointNotFoundError, CorruptCheckpointError, UsageError
from shardsmith.formats.safetensors_files.header import Header, quote, read_header
from shardsmith.formats.safetensors_files.index import (
    check_weight_map,
    is_there,
    read_weight_map,
    resolve,
    resolve_shards,
)
from shardsmith.ground.file_tensor import FileTensor
from shardsmith.ground.layout import MAIN_WEIGHTS, index_file_name
from shardsmith.ground.mapped import MappedFile
from shardsmith.ground.remote_path import as_path
from shardsmith.tensors.tensors import Chunk, Shape, TensorSpec

_WEIGHTS_NAME = re.compile(r"(?P<stem>.+?)(-[0-9]{5}-of-(?P<count>[0-9]{5}))?\.safetensors(\.index\.json)?")


class SafetensorsSource:
    """The tensors of one or several safetensors files. Opening reads the headers and checks all they say.

    Attributes:
        headers: File name to its header.
        file_of: Tensor name to the name of its file.
    """

    def __init__(self, path: str | Path, files: Mapping[str, Path] | None = None) -> None:
        """Open a file, or several that make up one model.

        Args:
            path: A file, or a link to one. With ``files``: the directory that stands for them.
            files: Paths of regular files by name, in the order in which their tensors are listed.

        Raises:
            CheckpointNotFoundError: a file is not there.
            IncompleteCheckpointError: a file is truncated.
            CorruptCheckpointError: a header is not valid, or two files hold a tensor of the same name.
            UnsupportedFormatError: torch cannot represent a tensor.
            UnsafeCheckpointError: a file is not a regular file.
        """
        self.path = as_path(path)
        self._files: dict[str, MappedFile] = {}
        self.headers: dict[str, Header] = {}
        self.file_of: dict[str, str] = {}
        self.specs: dict[str, TensorSpec] = {}
        try:
            for name, place in ({self.path.name: self.path} if files is None else files).items():
                file = self._files[name] = MappedFile(place, follow_links=files is None)
                self._add(name, read_header(file.path, file.size, file.bytes))
        except BaseException:
            self.close()
            raise

    def pieces(self, name: str, box: Chunk) -> Iterator[tuple[Chunk, Tensor]]:
        """The box as one tensor, or nothing where the box is empty.

        Raises:
            CheckpointNotFoundError: there is no such tensor.
            CheckpointError: it cannot be read.
        """
        stored = self.stored(name)
        if box.numel:
            yield box, stored[box.within(Chunk.whole(stored.shape))]

    def stored(self, name: str, shape: Shape | None = None) -> FileTensor:
        """Return where a tensor lies, in another shape of as many elements if one is given.

        Raises:
            CheckpointNotFoundError: there is no such tensor.
        """
        spec = self.specs.get(name)
        if spec is None:
            raise CheckpointNotFoundError(self.path, f"has no tensor named {name!r}")
        file = self.file_of[name]
        begin = self.headers[file].tensors[name].begin
        return FileTensor.contiguous(self._files[file], begin, spec.shape if shape is None else shape, spec.dtype)

    def close(self) -> None:
        """Close the files. Tensors that were read stay valid."""
        for file in self._files.values():
            file.close()

    def _add(self, file: str, header: Header) -> None:
        self.headers[file] = header
        for name, placement in header.tensors.items():
            first = self.file_of.setdefault(name, file)
            # Readers differ in which one of two such tensors they take.
            if first != file:
                raise CorruptCheckpointError(self.path, f"tensor {quote(name)} is in both {first} and {file}")
            self.specs[name] = placement.spec


def open_safetensors_directory(directory: str | Path, stem: str | None = None) -> SafetensorsSource:
    """Open the weights in a Hugging Face directory.

    A single file comes before an index, as in transformers. Links may lead to the blobs of the Hugging Face cache that
    the directory lies in, and nowhere else out of it.

    Args:
        directory: A Hugging Face directory.
        stem: What the weight files are called: "model" for model.safetensors and model.safetensors.index.json. None:
            that if it is there, and otherwise the only one that is.

    Raises:
        CheckpointNotFoundError: there is no directory, or there are no such weights in it.
        IncompleteCheckpointError: files that the index names are missing, or a file is truncated.
        CorruptCheckpointError: the index is not valid or contradicts the headers; and as ``SafetensorsSource``.
        UnsafeCheckpointError: the index or a link points out of the directory.
        UsageError: ``stem`` is needed to choose.
    """
    directory = as_path(directory)
    stem = stem or _find_stem(directory)
    single, index = f"{stem}.safetensors", index_file_name(stem)
    # A dangling link counts as there: the error then names it, and no other weights are taken instead.
    if is_there(directory / single):
        return SafetensorsSource(directory, {single: resolve(directory, single)})
    if not is_there(directory / index):
        raise CheckpointNotFoundError(directory, f"has neither {single} nor {index}")
    weight_map = read_weight_map(directory / index, ".safetensors")
    source = SafetensorsSource(directory, resolve_shards(directory, weight_map))
    check_weight_map(directory / index, weight_map, source.file_of)
    return source


def _find_stem(directory: Path) -> str:
    if not directory.is_dir():
        raise CheckpointNotFoundError(directory, "no such directory")
    stems = sorted({match["stem"] for one in directory.iterdir() if (match := _WEIGHTS_NAME.fullmatch(one.name))})
    if MAIN_WEIGHTS in stems or not stems:
        return MAIN_WEIGHTS
    if len(stems) > 1:
        raise UsageError(f"{directory} holds several sets of weights ({', '.join(stems)}); name one of them as stem")
    return stems[0]
