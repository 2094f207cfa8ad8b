"""What a test asks of TorchTitan's step folders."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from shardsmith.formats.by_path import open_source
from shardsmith.formats.dcp.source import DcpSource
from shardsmith.manifest.checkpoints import find_damage
from shardsmith.manifest.metadata import read_metadata
from shardsmith.tensors.tensors import read_tensor


def tensors_of(checkpoint: Path, model: str = "main") -> dict[str, Tensor]:
    """The weights of one model, whole."""
    source = open_source(checkpoint, model)
    try:
        return {name: read_tensor(source, name) for name in source.specs}
    finally:
        source.close()


def value_of(checkpoint: Path, key: str) -> Tensor:
    source = DcpSource(checkpoint)
    try:
        return read_tensor(source, key)
    finally:
        source.close()


def digests_of(checkpoint: Path, prefix: str = "") -> dict[str, str]:
    """Digest of every tensor, as recorded; the recorded files are as they were."""
    assert find_damage(checkpoint) == []
    tensors = read_metadata(checkpoint).tensors
    return {key: record.digest for key, record in tensors.items() if key.startswith(prefix)}


def steps_in(folder: Path) -> list[str]:
    """Names of what is in it, but for what the run keeps."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".retention.json")
