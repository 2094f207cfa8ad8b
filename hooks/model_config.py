"""The config of a live model, as its library saves it and with every default."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from torch import nn

from shardsmith.hf.blueprint import plain_config
from shardsmith.hf.model_code import code_of_model
from shardsmith.tensors.fqn import own_class


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
