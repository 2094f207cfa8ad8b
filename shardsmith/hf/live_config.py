"""What a live model says of itself: its config as its library saves it and with every default, and how it generates."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from shardsmith.hf.blueprint import plain_config
from shardsmith.hf.hf_directory import read_config
from shardsmith.hf.known_class import model_class_of
from shardsmith.hf.model_code import code_of_model
from shardsmith.manifest.metadata import read_json
from shardsmith.manifest.model_settings import GENERATION_FILE, ModelSettings, without_origin
from shardsmith.tensors.fqn import own_class, unwrapped

log = logging.getLogger(__name__)


def settings_of(model: nn.Module | None) -> ModelSettings:
    """Return what a model of transformers or diffusers says now; of any other, an empty config."""
    generation: Any = getattr(model, "generation_config", None)
    if generation is None:
        return ModelSettings(config=full_config(model), generation_config=None, generates_by_config=False)
    content: dict[str, Any] = json.loads(generation.to_json_string())
    default = type(generation).from_model_config(getattr(model, "config", None))
    by_config = without_origin(generation.to_dict()) == without_origin(default.to_dict())
    return ModelSettings(config=full_config(model), generation_config=content, generates_by_config=by_config)


class RecordedSettings:
    """The content of ``model_config.json`` for a module that trains, made again only where its configs have changed."""

    def __init__(self) -> None:
        self._seen: bytes | None = None
        self._content: bytes | None = None

    def of(self, model: nn.Module) -> bytes | None:
        """Return it as it is now; None if the module holds no model with a config. No communication.

        Raises nothing: what cannot be written as JSON is in the log, and the step is saved without it.
        """
        held = list(_models_with_config(unwrapped(model)))
        # Of several, such as a policy and its critic, nobody could tell which one is exported.
        if len(held) != 1:
            return None
        seen = _pickled(held[0])
        if seen is None or seen != self._seen:
            self._seen, self._content = seen, _content_of(held[0])
        return self._content


def _pickled(model: nn.Module) -> bytes | None:
    """All that a model of a library says of itself follows from; None if it has a config that cannot be pickled."""
    try:
        return pickle.dumps(
            (own_class(model), getattr(model, "config", None), getattr(model, "generation_config", None))
        )
    except Exception:  # whatever a class of somebody raises there
        return None


def _content_of(model: nn.Module) -> bytes | None:
    try:
        return settings_of(model).to_json()
    except Exception as error:
        log.warning("the config of %s is not recorded: %s: %s", type(model).__name__, type(error).__name__, error)
        return None


def settings_of_directory(directory: Path) -> ModelSettings | None:
    """Return what the model of a Hugging Face directory says; None where no library knows its class.

    Raises CheckpointError if one of its two files cannot be read.
    """
    model_class, _ = model_class_of(read_config(directory))
    if model_class is None:
        return None
    file = directory / GENERATION_FILE
    generation = read_json(file) if file.is_file() else None
    config = dict(model_class.effective_config)
    return ModelSettings(config=config, generation_config=generation, generates_by_config=False)


def _models_with_config(module: Any) -> Iterator[Any]:
    """Outermost modules that a library saves with a config; of one of peft the model inside."""
    if hasattr(module, "save_pretrained") and (
        hasattr(module, "to_json_string") or hasattr(getattr(module, "config", None), "to_json_string")
    ):
        yield module.get_base_model() if hasattr(module, "get_base_model") else module
        return
    for child in module.children():
        yield from _models_with_config(unwrapped(child))


def saved_config(model: nn.Module | None) -> dict[str, Any] | None:
    """Return the content of config.json that ``save_pretrained`` would write; None for a model without one."""
    owner = model if hasattr(model, "to_json_string") else getattr(model, "config", None)  # diffusers: the model
    to_json: Callable[[], str] | None = getattr(owner, "to_json_string", None)
    if model is None or to_json is None:
        return None
    content: dict[str, Any] = json.loads(to_json())
    if owner is not model and not content.get("architectures"):
        # transformers fills it in when it saves; FSDP2 makes a class of its own
        content["architectures"] = [own_class(model).__name__]
    if code := code_of_model(model)[0]:
        content["auto_map"] = {**content.get("auto_map", {}), **code}
    return content


def full_config(model: nn.Module | None) -> dict[str, Any]:
    """Return the config with every default filled in; empty for a model that has none."""
    config = getattr(model, "config", None)
    if getattr(model, "to_json_string", None) is not None:  # diffusers: the model, which keeps every default
        return saved_config(model) or {}
    if model is None or not hasattr(config, "to_json_string"):
        return {}
    kinds = [kind.__name__ for kind in own_class(model).__mro__ if kind.__module__.startswith("transformers.")]
    return {**plain_config(config), "architectures": kinds[:1]}
