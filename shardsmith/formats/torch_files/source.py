"""Tensors out of ``torch.save`` files as a ``TensorSource``."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from shardsmith.errors import CheckpointNotFoundError, CorruptCheckpointError
from shardsmith.formats.models import ModelSource, choose_model
from shardsmith.formats.safetensors_files.index import check_weight_map, read_weight_map, resolve, resolve_shards
from shardsmith.formats.torch_files.files import MergedTensor, merge_ranks, read_torch_file
from shardsmith.sharding.boxes import BoxFinder, IrregularBoxesError, find_overlap
from shardsmith.tensors.checkpoint_keys import MAIN, KeyPath, find_models
from shardsmith.tensors.tensors import Chunk, TensorSpec

_WRAPPERS = frozenset({"state_dict", "module", "model_state_dict"})
"""Under which key, beside ``model``, people put a model's state dict."""
_LIGHTNING_AVERAGE = "state_dict"
"""Where Lightning's WeightAveraging puts the average."""


class TorchSource:
    """Tensors by the joined path of their keys. What several files hold is compared whenever it is read.

    Attributes:
        paths: Name -> path in the nested dict that was saved.
    """

    def __init__(self, path: Path, tensors: Mapping[KeyPath, MergedTensor]) -> None:
        """Raises CorruptCheckpointError if parts overlap, or two paths give one name."""
        self.path = path
        roots = _roots(tensors)
        self.paths = {".".join(map(str, keys)): _known(keys, roots) for keys in tensors}
        if len(self.paths) != len(tensors):
            raise CorruptCheckpointError(path, "two of its keys are the same once they are joined with dots")
        self._tensors = dict(zip(self.paths, tensors.values(), strict=True))
        self.specs: Mapping[str, TensorSpec] = {
            name: TensorSpec(name, tensor.shape, tensor.dtype) for name, tensor in self._tensors.items()
        }
        self._finders = {name: _finder(path, name, tensor) for name, tensor in self._tensors.items()}

    def pieces(self, name: str, box: Chunk) -> Iterator[tuple[Chunk, Tensor]]:
        """As ``TensorSource.pieces``.

        Raises:
            CheckpointNotFoundError: there is no such tensor.
            CorruptCheckpointError: files that hold the same part of it hold different values.
        """
        if name not in self._tensors:
            raise CheckpointNotFoundError(self.path, f"has no tensor named {name!r}")
        copies = self._tensors[name].copies
        boxes = list(copies)
        for i, part in self._finders[name].meeting(box):
            # Each file that has this box is read and compared: nothing else shows that files are of different saves.
            index = part.within(boxes[i])
            (file, values), *replicas = copies[boxes[i]]
            found = values[index]
            for other, replica in replicas:
                # By bytes: NaN is not equal to itself, and -0.0 is equal to 0.0.
                if not torch.equal(_as_bytes(found), _as_bytes(replica[index])):
                    raise CorruptCheckpointError(self.path, f"{name}: {file} and {other} hold different values of it")
            yield part, found

    def close(self) -> None:
        """Close the files. Tensors that were read stay valid."""
        self._tensors.clear()


def open_torch_file(path: Path, model: str = MAIN) -> ModelSource:
    """One model of a ``torch.save`` file."""
    source = _source(path, {path.name: path}, follow_links=True)
    return choose_model(source, source.paths, model)


def open_torch_directory(directory: Path, single: str, model: str = MAIN) -> ModelSource:
    """One model of a directory with, say, ``pytorch_model.bin``, or with several such files and an index.

    Raises:
        CheckpointNotFoundError: it has neither.
        CorruptCheckpointError, IncompleteCheckpointError, UnsafeCheckpointError: as for safetensors files.
    """
    source = _directory_source(directory, single)
    return choose_model(source, source.paths, model)


def torch_directory_models(directory: Path, single: str) -> list[str]:
    """Return which of ``main`` and ``ema`` such files hold. Raises as ``open_torch_directory``."""
    source = _directory_source(directory, single)
    return list(find_models(source.specs, source.paths))


def _directory_source(directory: Path, single: str) -> TorchSource:
    if (directory / single).is_file():
        return _source(directory, {single: resolve(directory, single)})
    index = directory / f"{single}.index.json"
    if not index.is_file():
        raise CheckpointNotFoundError(directory, f"has neither {single} nor {index.name}")
    weight_map = read_weight_map(index, Path(single).suffix)
    # After read_weight_map has refused names that lead out of the directory.
    files = resolve_shards(directory, weight_map)
    check_weight_map(
        index, weight_map, {".".join(map(str, keys)): name for name in files for keys in read_torch_file(files[name])}
    )
    return _source(directory, files)


def open_rank_files(directory: Path, names: Sequence[str], model: str = MAIN) -> ModelSource:
    """Open one model that the files of all ranks make up."""
    source = _source(directory, {name: directory / name for name in names})
    return choose_model(source, source.paths, model)


def rank_files_models(directory: Path, names: Sequence[str]) -> list[str]:
    """Name which of ``main`` and ``ema`` the files of all ranks hold. Raises as ``merge_ranks``."""
    source = _source(directory, {name: directory / name for name in names})
    return list(find_models(source.specs, source.paths))


def open_rank_states(directory: Path, names: Sequence[str]) -> TorchSource:
    """All tensors that the files of all ranks make up, by the joined path of their keys; no model is looked for."""
    return _source(directory, {name: directory / name for name in names})


def models_of(path: Path) -> list[str]:
    """Return which of ``main`` and ``ema`` a ``torch.save`` file holds."""
    source = _source(path, {path.name: path}, follow_links=True)
    return list(find_models(source.specs, source.paths))


def describe_models(path: Path) -> str:
    """Return the same as a text, which says where they lie if not where their names suggest."""
    source = _source(path, {path.name: path}, follow_links=True)
    text = f"{', '.join(find_models(source.specs, source.paths)) or 'no'} weights"
    is_average = any(
        keys[0] == "average" and name.startswith(f"{_LIGHTNING_AVERAGE}.") for name, keys in source.paths.items()
    )
    where = ", written with Lightning's WeightAveraging: main is its current_model_state, ema its state_dict"
    return text + (where if is_average else "")


def _source(path: Path, files: Mapping[str, Path], *, follow_links: bool = False) -> TorchSource:
    held = [(name, read_torch_file(file, follow_links=follow_links)) for name, file in files.items()]
    return TorchSource(path, merge_ranks(path, held))


def is_of_lightning_average(paths: Collection[KeyPath]) -> bool:
    """Return whether Lightning's WeightAveraging wrote these: ``state_dict`` is the average, and the model lies beside.

    Its ``averaging_state`` is what torch's AveragedModel has beside the average, a count of updates.
    """
    roots = {keys[0] for keys in paths if len(keys) > 1}
    return ("averaging_state", "n_averaged") in paths and {"state_dict", "current_model_state"} <= roots


def _roots(paths: Collection[KeyPath]) -> Mapping[str | int, str]:
    """What other projects call the dict of a model, or of its average -> what we call it."""
    if is_of_lightning_average(paths):
        return {"current_model_state": "model", _LIGHTNING_AVERAGE: "average"}
    return dict.fromkeys(_WRAPPERS, "model")


def _known(keys: KeyPath, roots: Mapping[str | int, str]) -> KeyPath:
    """The path with such a name of a dict replaced by ours."""
    return (roots.get(keys[0], keys[0]), *keys[1:]) if len(keys) > 1 else keys


def _finder(path: Path, name: str, tensor: MergedTensor) -> BoxFinder:
    boxes = list(tensor.copies)
    try:
        overlap = find_overlap(boxes)
    except IrregularBoxesError as error:
        raise CorruptCheckpointError(path, f"{name}: is cut up too irregularly to be checked: {error}") from error
    if overlap:
        raise CorruptCheckpointError(path, f"{name}: its parts {overlap[0]} and {overlap[1]} overlap")
    return BoxFinder(boxes)


def _as_bytes(values: Tensor) -> Tensor:
    return values.contiguous().reshape(-1).view(torch.uint8)
