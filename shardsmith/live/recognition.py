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
        self._parts = [_Part.of(module) for module in model.modules()]

    def fits(self, model: nn.Module) -> bool:
        """Whether all is as it was: nothing replaced, added, removed, renamed, retyped, or sharded in another way."""
        # What is in a module is known by ``id``, which stays unique as long as all that was there is alive.
        return self._parts[0].module() is model and all(part.fits() for part in self._parts)


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
    form: Any

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        return cls(weakref.ref(tensor), _form(tensor))

    def fits(self, tensor: Tensor) -> bool:
        return self.tensor() is tensor and self.form == _form(tensor)


@dataclass(frozen=True, slots=True)
class _Part:
    """A module without those in it."""

    module: weakref.ref[nn.Module]
    children: list[tuple[str, int]]
    """Name and ``id``."""
    hooks: tuple[int, ...]
    transient: frozenset[str]
    """Its buffers that no state dict holds."""
    tensors: dict[str, _TensorId]

    @classmethod
    def of(cls, module: nn.Module) -> Self:
        tensors = {key: _TensorId.of(tensor) for key, tensor in _tensors(module)}
        transient = frozenset(module._non_persistent_buffers_set)
        return cls(weakref.ref(module), _children(module), _hooks(module), transient, tensors)

    def fits(self) -> bool:
        module = self.module()
        if module is None or self.children != _children(module) or self.hooks != _hooks(module):
            return False
        if self.transient != module._non_persistent_buffers_set:
            return False
        now = dict(_tensors(module))
        return [*now] == [*self.tensors] and all(map(_TensorId.fits, self.tensors.values(), now.values()))


def _children(module: nn.Module) -> list[tuple[str, int]]:
    return [(name, id(child)) for name, child in module._modules.items()]


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


def _form(tensor: Tensor) -> Any:
    """Shape, dtype and, of a DTensor, mesh and placements."""
    if isinstance(tensor, DTensor):
        return tensor._spec, tensor._local_tensor.dtype  # shape, mesh and placements are in the first
    return tensor.shape, tensor.dtype


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
