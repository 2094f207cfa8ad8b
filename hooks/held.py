"""A model that a module of somebody else's holds: a LightningModule, a policy, the wrapper of Fabric."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from shardsmith.hf.hf_directory import main_stem
from shardsmith.tensors.fqn import clean_fqn, tied_weights, unwrapped

from .view import View


class HeldView(View):
    """The model alone, under its own names, as its ``save_pretrained`` would write it.

    Attributes:
        stem: Of the weight files, as the model's library wants it.
        inner: The model.
        prefix: Of the names in the module, where it is held.
    """

    def __init__(self, path: str, inner: Any) -> None:
        # a model of diffusers is its own config
        self.stem = main_stem(json.loads(inner.to_json_string()) if hasattr(inner, "to_json_string") else None)
        self.inner: nn.Module | None = inner
        self._held = inner
        self.prefix = f"{path}."

    def names(self, fqns: Iterable[str]) -> dict[str, str]:
        """FQN -> name in the files, of what is to be written."""
        return {fqn: fqn.removeprefix(self.prefix) for fqn in fqns if fqn.startswith(self.prefix)}

    def ties(self) -> dict[str, str]:
        """As ``tied_weights``, of the model alone: Fabric's wrapper has it under two names."""
        return {self.prefix + alias: self.prefix + kept for alias, kept in tied_weights(self._held).items()}


def held_model(model: nn.Module) -> HeldView | None:
    """Return the model of transformers or diffusers that a module holds, and all of whose tensors are that model's.

    None where the module is itself one, or where it has tensors of its own, or of several models: then the names in
    the module are the model's.
    """
    here, path = unwrapped(model), ""
    # What can be saved by itself is the model; a sequence, such as a sentence encoder, saves each of its modules.
    while not hasattr(here, "save_pretrained") or isinstance(here, nn.Sequential):
        # One child with tensors, and none outside it: then all tensors are that child's.
        children = [(name, child) for name, child in here.named_children() if _has_tensors(child)]
        if len(children) != 1 or any(True for _ in _own_tensors(here)):
            return None
        name, child = children[0]
        path = f"{path}.{name}" if path else name
        here = unwrapped(child)
    path = clean_fqn(path, unwrapped(model))
    return HeldView(path, here) if path else None


def _own_tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from (tensor for tensor in module._parameters.values() if tensor is not None)
    # Non-persistent buffers are in no state dict.
    kept = module._buffers.keys() - module._non_persistent_buffers_set
    yield from (tensor for name in kept if (tensor := module._buffers[name]) is not None)


def _has_tensors(module: nn.Module) -> bool:
    return any(True for part in module.modules() for _ in _own_tensors(part))
