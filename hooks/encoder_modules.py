"""Settings of a live sentence encoder's modules that hold no weights, such as how it pools the tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from shardsmith.errors import MismatchError
from shardsmith.hf.modules import MODULES_FILE, Modules
from shardsmith.manifest.metadata import read_json
from shardsmith.tensors.fqn import own_class, unwrapped


class EncoderModules:
    """The modules of a sentence encoder that say their settings, compared with those in the base model's files.

    The settings change every embedding, and no tensor shows them.
    """

    def __init__(self, model: nn.Module, base: Path | None) -> None:
        """Read the base model's files. No communication.

        Args:
            model: The module that trains, an encoder or what holds one. Of any other model there are no modules.
            base: The base model's directory; without one, or without its ``modules.json``, there are no modules.

        Raises:
            MismatchError: the encoder does not have the modules of the base model.
            CheckpointError: a file of the base model cannot be read.
        """
        self._modules: dict[str, Any] = {}
        self._in_base: dict[str, dict[str, Any] | None] = {}
        encoder = next((part for part in model.modules() if _is_encoder(part)), None)
        if encoder is None or base is None or not (listed := Modules(base)).folders:
            return
        modules = {name: unwrapped(module) for name, module in encoder.named_children()}
        _refuse_others({name: own_class(module).__name__ for name, module in modules.items()}, listed, base)
        for name, module in modules.items():
            if hasattr(module, "get_config_dict") and isinstance(
                file := getattr(module, "config_file_name", None), str
            ):
                path = f"{listed.folders[name]}/{file}".lstrip("/")
                self._modules[path] = module
                self._in_base[path] = read_json(base / path) if (base / path).is_file() else None

    def settings(self) -> dict[str, str]:
        """Return what the files of the base model do not say as the modules do now. No communication.

        Returns:
            Name in the directory, such as ``1_Pooling/config.json`` -> content, as the module's ``save`` writes it.
        """
        texts = {path: json.dumps(module.get_config_dict(), indent=4) for path, module in self._modules.items()}
        return {path: text + "\n" for path, text in texts.items() if json.loads(text) != self._in_base[path]}


def _is_encoder(module: nn.Module) -> bool:
    """Whether it is a sequence that saves each of its modules by itself."""
    return isinstance(module, nn.Sequential) and hasattr(module, "save_pretrained")


def _refuse_others(kinds: Mapping[str, str], listed: Modules, base: Path) -> None:
    """Raise MismatchError if the modules do not have the names and classes that the base model lists."""
    wanted = {name: listed.kinds.get(name) or kinds.get(name, "a module") for name in listed.folders}
    lines = [
        f"{name}: {kinds.get(name, 'nothing')} in the model, {wanted.get(name, 'nothing')} in {MODULES_FILE}"
        for name in dict.fromkeys((*wanted, *kinds))
        if kinds.get(name) != wanted.get(name)
    ]
    if lines:
        summary = f"{len(lines)} modules of the model that trains are not as in the base model"
        advice = (
            "Nothing was written. Save the encoder with its own save_pretrained(DIRECTORY) before it is sharded, and "
            "give that directory as base_model."
        )
        raise MismatchError(base, summary, lines, advice)
