"""Whether a model still consists of what it consisted of, so that what was worked out about it need not be again."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from shardsmith.sharding.local_boxes import local
from shardsmith.tensors.fqn import clean_fqn


class Recognition:
    """A model as it was looked at: its modules and their tensors, by name and identity, and its state-dict hooks.

    Values may change, and so may the memory that they are in. It keeps nothing alive. No communication.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = [*model.modules()]
        self._modules = [weakref.ref(module) for module in modules]
        self._parts, tensors = _looked_through(modules)
        self._tensors = [weakref.ref(tensor) for tensor in tensors]
        self._ids, self._forms = [*map(id, tensors)], _forms(tensors)

    def fits(self, model: nn.Module) -> bool:
        """Whether all is as it was: nothing replaced, added, removed, renamed, retyped, or sharded in another way."""
        modules = [module for reference in self._modules if (module := reference()) is not None]
        if len(modules) != len(self._modules) or modules[0] is not model:
            return False
        # It is made at every save, of thousands of modules: so two lists are compared, not one module after another.
        # What is in a module is known by ``id``, which stays unique as long as all that was there is alive.
        parts, tensors = _looked_through(modules)
        alive = [reference() for reference in self._tensors]
        is_same = parts == self._parts and [*map(id, tensors)] == self._ids == [*map(id, alive)]
        return is_same and _forms(tensors) == self._forms


def own_tensors(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Return the model's own parameters and buffers by the names that a state dict has for them.

    None if the state dict might hold other things than these, today or tomorrow: those that hooks make, and FSDP1.
    """
    if any(isinstance(module, FullyShardedDataParallel) or _has_foreign_hooks(module) for module in model.modules()):
        return None
    named = itertools.chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    mine = {clean_fqn(name, model): tensor for name, tensor in named}
    found = {name: mine[name] for name, value in state.items() if name in mine and is_same_memory(mine[name], value)}
    return found if len(found) == len(state) else None


def _looked_through(modules: Iterable[nn.Module]) -> tuple[list[Any], list[Tensor]]:
    """What modules consist of, one after another: names and ``id`` of what is in them, numbers of hooks; the tensors.

    Numbers of hooks are given by torch, and never twice.
    """
    parts, tensors = list[Any](), list[Tensor]()
    for module in modules:
        inside, parameters, buffers = module._modules, module._parameters, module._buffers
        hooks = (*module._state_dict_hooks, *module._state_dict_pre_hooks)
        parts += (*inside, *map(id, inside.values()), hooks)
        if parameters or buffers:
            held = [*parameters.items(), *buffers.items()]
            # copied, as the set changes in place
            parts.append(([name for name, one in held if one is not None], {*module._non_persistent_buffers_set}))
            tensors += [one for _, one in held if one is not None]
    return parts, tensors


def _forms(tensors: Iterable[Tensor]) -> list[Any]:
    """Of each shape and dtype; of a DTensor the spec, in which are shape, mesh and placements, and the dtype."""
    return [
        (tensor._spec, tensor._local_tensor.dtype) if isinstance(tensor, DTensor) else (tensor.shape, tensor.dtype)
        for tensor in tensors
    ]


def _has_foreign_hooks(module: nn.Module) -> bool:
    """Whether state-dict hooks are there that are not those by which FSDP and wrappers of torch clean up."""
    hooks = (*module._state_dict_hooks.values(), *module._state_dict_pre_hooks.values())
    return any(not getattr(hook, "__module__", "").startswith("torch.distributed.") for hook in hooks)


def _sharding(tensor: Tensor) -> Any:
    return (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else None


@torch.no_grad()
def is_same_memory(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are one, or views of all of the same."""
    if isinstance(one, DTensor) != isinstance(other, DTensor) or _sharding(one) != _sharding(other):
        return False
    a, b = local(one), local(other)
    alike = (a.dtype, a.device, a.shape, a.stride()) == (b.dtype, b.device, b.shape, b.stride())
    return alike and one.shape == other.shape and a.data_ptr() == b.data_ptr()
