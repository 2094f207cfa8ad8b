"""Whole weights in files: safetensors and ``torch.save``, single or indexed."""

from __future__ import annotations

import os
import re
from fnmatch import fnmatchcase
from pathlib import Path

from shardsmith.errors import CheckpointError, CheckpointNotFoundError, UnsafeCheckpointError, UnsupportedFormatError
from shardsmith.formats.deepspeed import why_no_weights
from shardsmith.formats.detected import (
    HUGGINGFACE,
    INCOMPLETE,
    SAFETENSORS,
    TORCH,
    UNKNOWN,
    DetectedFormat,
    FormatReader,
    reason_of,
)
from shardsmith.formats.models import ModelSource, choose_model
from shardsmith.formats.safetensors_files.source import SafetensorsSource, open_safetensors_directory
from shardsmith.formats.torch_files.source import (
    describe_models,
    models_of,
    open_torch_directory,
    open_torch_file,
    torch_directory_models,
)
from shardsmith.ground import layout
from shardsmith.ground.remote_path import RemotePath
from shardsmith.tensors.checkpoint_keys import EMA, MAIN, find_models
from shardsmith.tensors.tensors import TensorSource

_STEMS = {MAIN: (layout.MAIN_WEIGHTS, layout.COMPONENT_WEIGHTS), EMA: (layout.EMA_WEIGHTS,)}
_TORCH_NAMES = {
    MAIN: ("pytorch_model.bin", "pytorch_model_fsdp.bin", "model.pt", f"{layout.COMPONENT_WEIGHTS}.bin"),
    EMA: ("ema.pt",),
}
_OF_ANOTHER_MODEL = re.compile(r"(model_[1-9][0-9]*\.safetensors|pytorch_model(_fsdp)?_[1-9][0-9]*\.bin)")
"""Of the second model that accelerate prepared, and the next ones."""
_TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80\x02"


def has_safetensors(path: Path, stem: str) -> bool:
    """Return whether a directory has a single safetensors file or an index of that stem.

    An index that is all there is of one stem says nothing if the other has weights: BAGEL's release has such a one.
    """
    if (path / f"{stem}.safetensors").is_file():
        return True
    stems = (other for ours in _STEMS.values() for other in ours)
    is_alone = not any((path / f"{other}.safetensors").is_file() for other in stems)
    if not (path / layout.index_file_name(stem)).is_file():
        return False
    # The shards themselves decide: an index without any file of its series is a leftover of the release.
    return is_alone or any(fnmatchcase(one.name, f"{stem}-*.safetensors") for one in path.iterdir())


def detect_huggingface(path: Path) -> DetectedFormat | None:
    """Return a directory with safetensors files called as transformers or diffusers calls them, or as an average."""
    found = []
    for model in _STEMS:
        if (stem := _stem(path, model)) is not None:
            try:
                source = open_safetensors_directory(path, stem)
            except CheckpointError as error:
                return DetectedFormat(INCOMPLETE, reason_of(error, path))
            found.append(f"{len(source.specs)} tensors in {', '.join(source.headers)}")
            source.close()
    return DetectedFormat(HUGGINGFACE, "; ".join([*found, *_other_models(path)])) if found else None


def safetensors_models(path: Path) -> list[str]:
    """Return which models a directory has safetensors files of, or in them."""
    found = [model for model in _STEMS if _stem(path, model) is not None]
    # Files of the average under a name of their own come first; else it may lie in the same files with a prefix.
    if found == [MAIN]:
        source = open_safetensors_directory(path, _stem(path, MAIN) or "")
        found = _models_in(source)
        source.close()
    return found


def open_safetensors_model(path: Path, model: str) -> ModelSource:
    """Return the weights of one model in a directory of safetensors files. Raises CheckpointError."""
    kind = model.partition(":")[0]
    if model == kind and (stem := _stem(path, kind)) is not None and kind != MAIN:
        return ModelSource.whole(open_safetensors_directory(path, stem))
    return _chosen(open_safetensors_directory(path, _stem(path, MAIN) or layout.MAIN_WEIGHTS), model)


def _models_in(source: TensorSource) -> list[str]:
    """Which models files of one name hold: main, and an average where its names are those of main with a prefix."""
    return [MAIN, EMA] if EMA in find_models(source.specs, {}) and find_models(source.specs, {}).get(MAIN) else [MAIN]


def _chosen(source: TensorSource, model: str) -> ModelSource:
    """One of the models that files of one name hold. Raises CheckpointNotFoundError."""
    if model == MAIN and _models_in(source) == [MAIN]:
        return ModelSource.whole(source)
    return choose_model(source, {}, model)


def _stem(path: Path, model: str) -> str | None:
    """The stem of a model's safetensors files in a directory; None where it has none."""
    return next((stem for stem in _STEMS[model] if has_safetensors(path, stem)), None)


def detect_torch_directory(path: Path) -> DetectedFormat | None:
    """Return a directory with a known name of a ``torch.save`` file, or an index of several."""
    found = []
    for model in _TORCH_NAMES:
        name = _torch_name(path, model)
        if name is not None:
            try:
                source = open_torch_directory(path, name)
            except (UnsafeCheckpointError, UnsupportedFormatError) as error:
                return DetectedFormat(UNKNOWN, f"{name} cannot be read: {reason_of(error, path)}")
            except CheckpointError as error:
                return DetectedFormat(INCOMPLETE, reason_of(error, path))
            found.append(f"{len(source.specs)} tensors in {name}")
            source.close()
    return DetectedFormat(TORCH, "; ".join([*found, *_other_models(path)])) if found else None


def _other_models(path: Path) -> list[str]:
    """What to say of the further models that accelerate saves beside the first one, if there are any."""
    # accelerate writes to disks, and in a store a listing is a request.
    names = [] if isinstance(path, RemotePath) else sorted(os.listdir(path))
    found = [name for name in names if _OF_ANOTHER_MODEL.fullmatch(name)]
    return [f"not read, as other models by their names: {', '.join(found)}"] if found else []


def detect_file(path: Path) -> DetectedFormat:
    """Return what a file is by its suffix and first bytes."""
    if path.suffix == ".safetensors":
        try:
            source = SafetensorsSource(path)
        except CheckpointError as error:
            return DetectedFormat(INCOMPLETE, reason_of(error, path))
        source.close()
        return DetectedFormat(SAFETENSORS, f"a header of {len(source.specs)} tensors")
    if (reason := why_no_weights(path)) is not None:
        return DetectedFormat(UNKNOWN, reason)
    with path.open("rb") as file:
        magic = file.read(4)
    # Only zips can be looked into without reading all of the file, so of an older one only the kind is said here.
    if path.suffix in _TORCH_SUFFIXES and magic.startswith(_PICKLE):
        return DetectedFormat(TORCH, f"a {path.suffix} file of torch before 1.6, which is read into memory as a whole")
    if path.suffix in _TORCH_SUFFIXES and magic == _ZIP:
        return _detect_torch_file(path)
    return DetectedFormat(UNKNOWN, f"a file that begins with {magic!r}")


def _detect_torch_file(path: Path) -> DetectedFormat:
    try:
        models = describe_models(path)
    except (UnsafeCheckpointError, UnsupportedFormatError) as error:
        return DetectedFormat(UNKNOWN, f"cannot be read: {reason_of(error, path)}")
    except CheckpointError as error:
        return DetectedFormat(INCOMPLETE, reason_of(error, path))
    return DetectedFormat(TORCH, f"a {path.suffix} file of torch.save with {models}")


def _torch_name(path: Path, model: str) -> str | None:
    """The name of the single file of a model, which may be there or stand for several with an index."""
    names = _TORCH_NAMES[model]
    return next((name for name in names for found in (name, f"{name}.index.json") if (path / found).is_file()), None)


def _open_file(path: Path, model: str) -> ModelSource:
    if path.suffix != ".safetensors":
        return open_torch_file(path, model)
    return _chosen(SafetensorsSource(path), model)


def _file_models(path: Path) -> list[str]:
    if path.suffix != ".safetensors":
        return models_of(path)
    source = SafetensorsSource(path)
    source.close()
    return _models_in(source)


def _open_torch(path: Path, model: str) -> ModelSource:
    if model == EMA and (name := _torch_name(path, EMA)) is not None:
        return open_torch_directory(path, name)
    name = _torch_name(path, MAIN)
    if name is None:
        raise CheckpointNotFoundError(path, f"has no {model!r} weights; it holds {', '.join(_torch_models(path))}")
    return open_torch_directory(path, name, model)


def _torch_models(path: Path) -> list[str]:
    found = [model for model in _TORCH_NAMES if _torch_name(path, model) is not None]
    name = _torch_name(path, MAIN)
    return torch_directory_models(path, name) if found == [MAIN] and name is not None else found


HUGGINGFACE_READER = FormatReader.by_path(detect_huggingface, safetensors_models, open_safetensors_model)
TORCH_READER = FormatReader.by_path(detect_torch_directory, _torch_models, _open_torch)
FILE_READER = FormatReader.by_path(detect_file, _file_models, _open_file)
