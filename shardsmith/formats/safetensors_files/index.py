"""The index of weights in several files (``*.index.json``), which is a stranger's input.

It may name only files beside it, and has to agree with what all of them hold.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardsmith.errors import CorruptCheckpointError, IncompleteCheckpointError, UnsafeCheckpointError
from shardsmith.formats.safetensors_files.header import quote, unique_object
from shardsmith.ground.json_budget import require_json_budget
from shardsmith.ground.mapped import MappedFile
from shardsmith.ground.remote_path import RemotePath

_MAX_INDEX_BYTES = 100_000_000
_PLAIN_STEM = re.compile(r"[^/\\:\0\ud800-\udfff]+")
_NUMBERED = re.compile(r"(?P<stem>.+?)-[0-9]{5}-of-(?P<count>[0-9]{5})\.[a-z]+")


def read_weight_map(index: Path, suffix: str) -> dict[str, str]:
    """Tensor name -> file name, of which each is a plain one with this suffix.

    Raises:
        UnsafeCheckpointError: a file, or the index itself, is not in the directory.
        CorruptCheckpointError: it is no index, or does not list all files of a numbered series.
    """
    file = MappedFile(resolve(index.parent, index.name))
    if file.size > _MAX_INDEX_BYTES:
        raise CorruptCheckpointError(index, f"has {file.size} bytes, which is over the limit of {_MAX_INDEX_BYTES}")
    try:
        text = file.bytes(0, file.size)
        require_json_budget(text)
        content = json.loads(text.decode(), object_pairs_hook=unique_object)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpointError(index, f"not a valid index: {error}") from None
    return _checked_weight_map(index, content, suffix)


def resolve_shards(directory: Path, weight_map: Mapping[str, str]) -> dict[str, Path]:
    """Name -> real path of the files that an index names. Raises IncompleteCheckpointError, naming all missing ones."""
    shards = sorted(set(weight_map.values()))
    if missing := [name for name in shards if not is_there(directory / name)]:
        lines = "\n  ".join([f"{len(missing)} of {len(shards)} weight files are missing", *map(quote, missing)])
        raise IncompleteCheckpointError(directory, lines)
    return {name: resolve(directory, name) for name in shards}


def is_there(path: Path) -> bool:
    """Return whether there is anything of that name, a dangling link included."""
    return path.is_file() if isinstance(path, RemotePath) else os.path.lexists(path)


def resolve(directory: Path, name: str) -> Path:
    """Return the file that a name in a directory really is, links followed as far as they are allowed to lead.

    That is within the directory, or to the blobs of the Hugging Face cache that it lies in.
    """
    if isinstance(directory, RemotePath):  # where there are no links
        return directory / name
    root = Path(os.path.realpath(directory))
    # The cache of huggingface_hub keeps snapshots/<revision>/<file> as links to ../../blobs/<hash>.
    found = Path(os.path.realpath(root / name))
    if not found.is_relative_to(root) and found.parent != _cache_blobs(root):
        raise UnsafeCheckpointError(directory / name, f"links to {found}, out of its directory; it was not read")
    return found


def check_weight_map(index: Path, weight_map: Mapping[str, str], file_of: Mapping[str, str]) -> None:
    """Raise CorruptCheckpointError unless every tensor is in the file that the index says, and no other is there."""
    wrong = sorted(name for name in weight_map.keys() | file_of.keys() if weight_map.get(name) != file_of.get(name))
    lines = [f"{quote(name)}: listed for {weight_map.get(name)}, found in {file_of.get(name)}" for name in wrong]
    if lines:
        summary = f"contradicts the headers of its files about {len(lines)} tensors"
        raise CorruptCheckpointError(index, "\n  ".join([summary, *lines]))


def _cache_blobs(root: Path) -> Path | None:
    """Where the Hugging Face cache keeps the files that ``<repo>/snapshots/<revision>/...`` links to."""
    revision = next((path for path in (root, *root.parents) if path.parent.name == "snapshots"), None)
    return revision.parent.parent / "blobs" if revision else None


def _checked_weight_map(index: Path, content: Any, suffix: str) -> dict[str, str]:
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptCheckpointError(index, "has no weight_map")
    if strange := [name for name, file in weight_map.items() if not isinstance(file, str)]:
        raise CorruptCheckpointError(index, f"names no file for {', '.join(map(quote, strange))}")
    if outside := sorted({file for file in weight_map.values() if not _is_plain(file, suffix)}):
        kind = suffix.removeprefix(".")
        lines = "\n  ".join([f"names what is no {kind} file beside it; nothing was read", *map(quote, outside)])
        raise UnsafeCheckpointError(index, lines)
    # A shard that no tensor is listed for is a sign of an index that was cut or edited.
    if gaps := _gaps(set(weight_map.values())):
        raise CorruptCheckpointError(index, "\n  ".join(["does not list all files of a numbered series", *gaps]))
    return weight_map


def _is_plain(name: str, suffix: str) -> bool:
    return name.endswith(suffix) and _PLAIN_STEM.fullmatch(name.removesuffix(suffix)) is not None


def _gaps(files: set[str]) -> list[str]:
    """What is missing if files called model-00001-of-00003.safetensors are to be 3: one line for each series."""
    listed = Counter((match["stem"], int(match["count"])) for match in filter(None, map(_NUMBERED.fullmatch, files)))
    return [f"{quote(stem)}: {found} of {count}" for (stem, count), found in sorted(listed.items()) if found != count]
