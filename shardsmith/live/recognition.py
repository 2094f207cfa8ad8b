"""Whether a model still consists of what it consisted of, so that what was worked out about it need not be again."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

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
        self._parts = [_Part.of(name, module) for name, module in _modules(model)]

    def fits(self, model: nn.Module) -> bool:
        """Whether all is as it was: nothing replaced, added, removed, renamed, retyped, or sharded in another way."""
        pairs = itertools.zip_longest(self._parts, _modules(model))
        return all(part is not None and now is not None and part.fits(*now) for part, now in pairs)


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


@dataclass(frozen=True, slots=True)
class _TensorId:
    """A tensor that is held weakly, and what can change of it in place."""

    tensor: weakref.ref[Tensor]
    dtype: torch.dtype
    shape: torch.Size
    sharding: Any

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        return cls(weakref.ref(tensor), tensor.dtype, tensor.shape, _sharding(tensor))

    def fits(self, tensor: Tensor) -> bool:
        is_same = self.tensor() is tensor and self.dtype == tensor.dtype and self.shape == tensor.shape
        return is_same and self.sharding == _sharding(tensor)


@dataclass(frozen=True, slots=True)
class _Part:
    """A module."""

    name: str
    module: weakref.ref[nn.Module]
    hooks: tuple[int, ...]
    transient: frozenset[str]
    """Its buffers that no state dict holds."""
    tensors: dict[str, _TensorId]

    @classmethod
    def of(cls, name: str, module: nn.Module) -> Self:
        tensors = {key: _TensorId.of(tensor) for key, tensor in _tensors(module)}
        return cls(name, weakref.ref(module), _hooks(module), frozenset(module._non_persistent_buffers_set), tensors)

    def fits(self, name: str, module: nn.Module) -> bool:
        is_same = self.name == name and self.module() is module and self.hooks == _hooks(module)
        if not is_same or self.transient != module._non_persistent_buffers_set:
            return False
        now = [*_tensors(module)]
        keys = [key for key, _ in now]
        return keys == [*self.tensors] and all(self.tensors[key].fits(tensor) for key, tensor in now)


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Under every name that they have, which makes a difference for the names of what they hold."""
    yield from model.named_modules(remove_duplicate=False)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for key, tensor in itertools.chain(module._parameters.items(), module._buffers.items()):
        if tensor is not None:
            yield key, tensor


def _hooks(module: nn.Module) -> tuple[int, ...]:
    """Numbers that torch gives to hooks, and never twice."""
    return (*module._state_dict_hooks, *module._state_dict_pre_hooks)


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
