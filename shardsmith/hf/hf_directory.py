"""What makes a Hugging Face directory complete beside its weights, and the protection of what it is made from.

The base model's directory is only ever read. Files are copied as bytes (a Hugging Face cache consists of links), so
the result stands on its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from shardsmith.errors import CheckpointNotFoundError, ProtectedPathError
from shardsmith.ground.commit import sync, writing
from shardsmith.ground.layout import COMPONENT_WEIGHTS, MAIN_WEIGHTS
from shardsmith.ground.local_copy import copy_file
from shardsmith.ground.path_advice import not_there
from shardsmith.ground.remote_path import RemotePath
from shardsmith.manifest.metadata import read_json
from shardsmith.tensors.dtypes import dtype_name

CONFIG_FILE = "config.json"


def copy_files(base: Path, names: Iterable[str], directory: Path) -> dict[str, int]:
    """Copy files, contents only, and fsync them; name -> size in bytes.

    Raises:
        WriteError: the copy failed.
    """
    sizes = {}
    for name in names:
        source, target = base / name, directory / name
        with writing(target, f"copying {source}"):
            # Contents only: a base model in a cache of the Hub consists of links, with modes of their own.
            copy_file(source, target)
            sync(target)
            sizes[name] = target.stat().st_size
    return sizes


def read_config(base: Path) -> dict[str, Any]:
    """Return the base model's ``config.json``.

    Raises:
        CheckpointNotFoundError: it has none, and nobody can load weights without one.
        CorruptCheckpointError: it is no JSON object.
    """
    if not base.exists():
        advice = "give the directory of the base model"
        # A name of the Hub looks like a relative path of two parts.
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(base)) and not base.parent.exists():
            advice += f". If this is its name on the Hugging Face Hub, run: hf download {base} --local-dir DIRECTORY"
        if isinstance(base, RemotePath):
            raise CheckpointNotFoundError(base, f"there is nothing of that name; {advice}")
        raise not_there(base, advice=advice)
    if base.name == CONFIG_FILE and base.is_file():
        raise CheckpointNotFoundError(base, f"is a file; give the directory that it is in, {base.parent}")
    if not (base / CONFIG_FILE).is_file() and (base / "model_index.json").is_file():
        raise CheckpointNotFoundError(base, "is a pipeline of diffusers; give the folder of one model in it, as unet/")
    if not (base / CONFIG_FILE).is_file():
        raise CheckpointNotFoundError(
            base,
            f"has no {CONFIG_FILE}; give the directory of the base model. A plain module has no such file: "
            "HFExport writes its weights during the training",
        )
    return read_json(base / CONFIG_FILE)


def config_for(config: dict[str, Any], dtype: torch.dtype) -> bytes:
    """``config.json`` for weights of this dtype: every dtype that the config states is replaced, at any depth.

    A config that states none gets one, under the name that it would use: ``dtype``, or ``torch_dtype`` before
    transformers 5. One of diffusers never states one, and would not be loaded with it.
    """
    changed = _with_dtype(config, dtype_name(dtype))
    if "dtype" not in changed and "torch_dtype" not in changed and not is_component(config):
        changed["dtype"] = dtype_name(dtype)
    return (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode()


def is_component(config: Mapping[str, Any]) -> bool:
    """Return whether it is the config of a model of diffusers."""
    return "_class_name" in config


def main_stem(config: Mapping[str, Any] | None) -> str:
    """Return what the main weights must be called for the library whose config this is to load them."""
    return COMPONENT_WEIGHTS if config is not None and is_component(config) else MAIN_WEIGHTS


def ties_word_embeddings(config: dict[str, Any]) -> bool:
    """Whether the config says that input and output embeddings are one tensor, for the model or its text part."""
    # A model of several parts says it in the config of its text part.
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    return any(part.get("tie_word_embeddings") is True for part in parts)


def protect(output: Path, *inputs: Path) -> None:
    """Raise ProtectedPathError if writing to ``output`` could touch an input: the same, inside, around, or linked.

    What exists is told by what it is, not by what it is called: through a bind mount, a hard link or a file system that
    does not mind case, one thing has many names. An input's own folders and files count as the input.
    """
    if isinstance(output, RemotePath):
        if near := [one for one in inputs if one == output or one in output.parents or output in one.parents]:
            raise ProtectedPathError(
                output, f"lies in, is or holds {near[0]}, which is only read; choose another output"
            )
        return
    # ``realpath``: what a link leads to is what would be written to.
    place = Path(os.path.realpath(output))
    itself = _identities([place])
    # Also the folders above: an output below an input would be written into it.
    around_it = itself | _identities(place.parents)
    for given in inputs:
        if isinstance(given, RemotePath):
            continue  # which nothing here can be
        source = Path(os.path.realpath(given))
        # By identity and by name: what does not exist yet has only a name.
        if source in (place, *place.parents) or around_it & _identities(_everything_in(source)):
            raise ProtectedPathError(output, f"lies in or is {given}, which is only read; choose another output")
        if place in source.parents or itself & _identities(source.parents):
            raise ProtectedPathError(output, f"holds {given}, which is only read; choose another output")


def _everything_in(source: Path) -> Iterator[Path]:
    """It, and what is below it, but for links to folders: whoever follows one is somewhere else."""
    yield source
    for place, folders, files in os.walk(source):
        yield from (Path(place, folder) for folder in folders if not Path(place, folder).is_symlink())
        yield from (Path(place, file) for file in files)


def _identities(paths: Iterable[Path]) -> set[tuple[int, int]]:
    """Device and inode of those that exist."""
    found = set()
    for path in paths:
        with contextlib.suppress(OSError):
            status = os.stat(path)
            found.add((status.st_dev, status.st_ino))
    return found


def _with_dtype(config: dict[str, Any], name: str) -> dict[str, Any]:
    return {
        key: name
        if key in ("dtype", "torch_dtype") and isinstance(value, str)
        else _with_dtype(value, name)
        # A quantisation has dtypes of its own, which say how its numbers are packed.
        if isinstance(value, dict) and key != "quantization_config"
        else value
        for key, value in config.items()
    }
