"""The base model's own weights as the template of what is exported: names, shapes, dtypes, and values where asked."""

from __future__ import annotations

import contextlib
import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from shardsmith.errors import CheckpointError
from shardsmith.formats.safetensors_files.source import open_safetensors_directory
from shardsmith.formats.torch_files.source import open_torch_directory
from shardsmith.ground import layout
from shardsmith.ground.remote_path import RemotePath
from shardsmith.tensors.tensors import TensorSpec, read_tensor

_TORCH_FILES = ("pytorch_model.bin", f"{layout.COMPONENT_WEIGHTS}.bin")


@dataclass(frozen=True, slots=True)
class BaseTemplate:
    """What the base model's weights are like."""

    path: Path
    """The base model's directory."""
    stem: str | None
    """Of its safetensors files; None where it has none."""
    specs: Mapping[str, TensorSpec]
    """Empty if it comes without weights."""
    origin: str
    """Which file they are in, or why there are none."""

    def values(self, name: str) -> Tensor | None:
        """One of its tensors, whole; None without."""
        if self.stem is None or name not in self.specs:
            return None
        source = open_safetensors_directory(self.path, self.stem)
        try:
            return read_tensor(source, name)
        finally:
            source.close()


def read_template(base: Path) -> BaseTemplate:
    """Read the headers of the base model's weights: those called ``model``, or as diffusers calls its own, or ``ema``,
    or their ``.bin``, or else a variant such as ``model.fp16``.

    An index whose files are all missing is left out, as in BAGEL's release, where it describes weights that only exist
    as ``ema.safetensors``.

    Raises:
        CheckpointError: it has weights that cannot be read, so that nothing could be compared with them.
    """
    # In this order, since a base may have several: what a loader takes by default comes first.
    absent = "it comes without weights"
    for stem in (layout.MAIN_WEIGHTS, layout.COMPONENT_WEIGHTS, layout.EMA_WEIGHTS):
        index = base / layout.index_file_name(stem)
        single = f"{stem}.safetensors"
        if not (base / single).exists() and not index.exists():
            continue
        # An index alone is no weights.
        if not (base / single).exists() and not _like(base, f"{stem}-*.safetensors"):
            absent = f"{index.name} is about files that are not there"
            continue
        source = open_safetensors_directory(base, stem)
        # The specs are in memory; nothing is left open while an export runs.
        source.close()
        return BaseTemplate(base, stem, source.specs, ", ".join(source.headers))
    return _torch_template(base) or _variant(base) or BaseTemplate(base, None, {}, absent)


def _variant(base: Path) -> BaseTemplate | None:
    """The weights that ``from_pretrained(variant=...)`` loads: the same tensors, usually of another dtype."""
    for main in (layout.MAIN_WEIGHTS, layout.COMPONENT_WEIGHTS):
        for name in _like(base, f"{main}.*.safetensors*"):
            # The part of a name that is not the variant: number of the shard, suffix, index.
            stem = re.sub(r"(-[0-9]{5}-of-[0-9]{5})?\.safetensors(\.index\.json)?$", "", name)
            with contextlib.suppress(CheckpointError):
                source = open_safetensors_directory(base, stem)
                source.close()
                return BaseTemplate(base, stem, source.specs, ", ".join(source.headers))
    return None


def _like(base: Path, pattern: str) -> list[str]:
    return sorted(path.name for path in base.iterdir() if fnmatch.fnmatchcase(path.name, pattern))


def _torch_template(base: Path) -> BaseTemplate | None:
    # They are read by maps of a local file.
    if isinstance(base, RemotePath):  # where such files are not read
        return None
    for name in _TORCH_FILES:
        with contextlib.suppress(CheckpointError):  # there is none, or it is not readable; safetensors is what we write
            source = open_torch_directory(base, name)
            source.close()
            return BaseTemplate(base, None, source.specs, name)
    return None
