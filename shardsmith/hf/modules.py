"""Models of sentence-transformers: what comes after the transformer has weights of its own, in a folder of its own.

``modules.json`` lists the modules, each with the name that its tensors begin with in the whole model, such as ``2``,
and the folder that it is saved in, such as ``2_Dense``. The transformer lies in the top folder.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from shardsmith.errors import CorruptCheckpointError
from shardsmith.ground.bounded import read_bounded
from shardsmith.hf.base_files import tensors_of
from shardsmith.tensors.checkpoint_keys import MAIN
from shardsmith.tensors.tensors import TensorSpec
from shardsmith.tensors.wrappers import WRAPPERS_IN_FILES

MODULES_FILE = "modules.json"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Of a module, in the order in which the library looks for them."""
_MOST_BYTES = 1 << 20
_DEEPEST = 3


@dataclass(frozen=True, slots=True)
class Module:
    """A module with weights of its own, beside the transformer."""

    name: str
    """What the names of its tensors begin with in the whole model."""
    folder: str
    """Where it is saved in the base model's directory."""
    specs: Mapping[str, TensorSpec]
    """The tensors of its file."""

    def called(self, model: str) -> str:
        """Return what it is called beside a model ("main", "ema") in a directory."""
        return self.folder if model == MAIN else f"{model} {self.folder}"

    def in_whole(self, name: str) -> str:
        """Return what the whole model calls a tensor of the module's file."""
        return f"{self.name}.{name}"

    def has_weights(self, file: str) -> bool:
        """Return whether a file of the base model holds its weights, by the path in the base's directory."""
        path = PurePosixPath(file)
        return str(path.parent) == self.folder and path.name in _WEIGHTS


class Modules:
    """The modules of a base model.

    Attributes:
        with_weights: Those that have weights in folders of their own; none for any other model.
        folders: Name of each module -> its folder, "" for the top one; empty without a ``modules.json``.
        kinds: Name of each module -> the name of its class, where the file says it.
    """

    def __init__(self, base: Path) -> None:
        """Raises CheckpointError if ``modules.json``, or the weights of a module, cannot be read."""
        listed = _listed(base / MODULES_FILE)
        self.folders = {name: folder for name, (folder, _) in listed.items()}
        self.kinds = {name: kind for name, (_, kind) in listed.items() if kind}
        self.with_weights: list[Module] = []
        for name, folder in self.folders.items():
            file = next((base / folder / one for one in _WEIGHTS if (base / folder / one).is_file()), None)
            if folder and file is not None:
                self.with_weights.append(Module(name, folder, tensors_of(file) or {}))

    def divide(self, names: Collection[str], *, absent: bool = False) -> list[tuple[Module, dict[str, str]]]:
        """Return the modules that have tensors in a model: for each, name in its file -> name in the model.

        Only where every name of the model begins as ``modules.json`` has it, perhaps behind what holds the whole:
        a layer of the transformer may have the number of a module, too. ``absent``: also those that have no tensor.
        """
        split = {name: [part for part in name.split(".") if part not in WRAPPERS_IN_FILES] for name in names}
        for depth in range(_DEEPEST if self.with_weights else 0):
            heads = {tuple(parts[:depth]) for parts in split.values()}
            if len(heads) == 1 and all(len(p) > depth + 1 and p[depth] in self.folders for p in split.values()):
                return [
                    (module, held)
                    for module in self.with_weights
                    if (held := {".".join(p[depth + 1 :]): n for n, p in split.items() if p[depth] == module.name})
                    or absent
                ]
        return []


def _listed(file: Path) -> dict[str, tuple[str, str]]:
    """Name of each module -> its folder, "" for the top one, and the name of its class. Empty without the file."""
    if not file.is_file():
        return {}
    try:
        listed = json.loads(read_bounded(file, _MOST_BYTES))
        found = {str(m["name"]): (str(m["path"]), str(m.get("type", "")).rpartition(".")[2]) for m in listed}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptCheckpointError(file, f"lists no modules: {type(error).__name__}: {error}") from error
    # What it says is text of somebody else: it must not lead out of the directory.
    if outside := [folder for folder, _ in found.values() if PurePosixPath(folder).is_absolute() or ".." in folder]:
        raise CorruptCheckpointError(file, f"names a folder outside of the directory: {outside[0]!r}")
    return found
