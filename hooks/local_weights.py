"""This rank's part of the live weights, to be read and written in place whatever shards them."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp._flat_param import FlatParameter
from torch.distributed.tensor import DTensor

from shardsmith.errors import UsageError
from shardsmith.load.live_weights import model_state_dict
from shardsmith.sharding.gathered import forget_gathered
from shardsmith.sharding.local_boxes import local as local
from shardsmith.tensors.fqn import clean_fqn, non_persistent_buffers, refuse_without_values, tied_weights


class LocalWeights:
    """The trainable floating-point parameters of a model by clean FQN; tied ones once, under the name that is kept.

    With them, on request, buffers. No communication anywhere. Nothing here needs gradients.

    Attributes:
        found: FQN -> parameter or buffer: a DTensor under FSDP2, this rank's flat part under FSDP1, else plain.
        buffers: FQNs of the buffers among them.
        tied: Alias -> kept FQN.
        is_fsdp1: Whether FSDP1 shards any part of the model.
    """

    def __init__(self, model: nn.Module, buffers: bool | Sequence[str] = False) -> None:
        """Find them. Raises UsageError if there are none, or one that cannot be averaged exactly.

        Args:
            model: The model that trains, wrapped and sharded.
            buffers: Patterns of names, or True for all floating-point buffers that a state dict holds.
        """
        refuse_without_values(model)
        self._model = model
        self.is_fsdp1 = any(isinstance(module, FullyShardedDataParallel) for module in model.modules())
        # A forward may have left parameters gathered; the shards are wanted.
        forget_gathered(model)
        self.tied = tied_weights(model)
        self._slots = _trainable(model, self.tied)
        if not self._slots:
            raise UsageError("the model has no trainable floating-point parameter: there is nothing to average")
        chosen = _chosen_buffers(model, buffers)
        self.buffers = frozenset(chosen)
        self._slots |= chosen
        _check_averageable(self._slots, self.is_fsdp1)
        self.found = {name: slot.tensor for name, slot in self._slots.items()}
        self._shapes = [local(tensor).shape for tensor in self.found.values()]
        self._are_renamed: bool | None = None

    @torch.no_grad()
    def tensors(self) -> list[Tensor]:
        """This rank's live weights in the order of ``found``. Looked up each time: FSDP may move them.

        Raises:
            UsageError: the model's parameters were replaced since.
        """
        weights = []
        for (name, slot), shape in zip(self._slots.items(), self._shapes, strict=True):
            weight = local(slot.current())
            if slot.was_replaced() or weight.shape != shape:
                raise UsageError(
                    f"{name} is no longer the {slot.kind} that EMA was built with: build EMA after sharding"
                )
            weights.append(weight)
        return weights

    def find_changes(self) -> list[str]:
        """Return what of the model is not as it was found: modules that were replaced, parameters that were added.

        No communication. One that was frozen since is no change.
        """
        # The dicts stand for their modules: a module that was replaced has left with its own.
        owners = {id(part) for module in self._model.modules() for part in (module._parameters, module._buffers)}
        gone = [name for name, slot in self._slots.items() if id(slot.owner) not in owners]
        added = [name for name in _trainable(self._model, self.tied) if name not in self._slots]
        return [
            f"{name} was {how} after EMA was made"
            for how, names in (("replaced", gone), ("added, or unfrozen,", added))
            for name in names
        ]

    @contextmanager
    def replaced_by(self, values: list[Tensor]) -> Iterator[None]:
        """Within it the live weights are ``values``, cast to their dtypes; then they are back, bit for bit."""
        with torch.no_grad():
            kept = [weight.clone() for weight in self.tensors()]
        try:
            self._overwrite(values)
            yield
        finally:
            self._overwrite(kept)

    def by_saved_names(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values in place of the parameters, by FQN, as the model's state dict would have them. Not under FSDP1.

        Some modules save other tensors than they train: a fused projection as its parts. The values then go through
        the same hooks, which may communicate; all ranks call it. Of any other model they are returned as they are.
        """
        if not self._saves_other_tensors():
            return dict(values)
        with self._substituted(values):
            saved = model_state_dict(self._model)
        untrained = {clean_fqn(name, self._model) for name, _ in self._model.named_buffers()}
        untrained |= {clean_fqn(name, self._model) for name, p in self._model.named_parameters() if not p.requires_grad}
        # Buffers that are averaged stay.
        untrained -= self.buffers
        return {name: value for name, value in saved.items() if name not in untrained and name not in self.tied}

    def load_by_saved_names(self, values: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> None:
        """Fill ``values`` in place from what ``by_saved_names`` gave for them. All ranks; may communicate as that."""
        if self._saves_other_tensors():
            with self._substituted(values):
                self._model.load_state_dict(dict(loaded), strict=False)
        else:
            torch._foreach_copy_([local(values[name]) for name in values], [local(loaded[name]) for name in values])

    def _saves_other_tensors(self) -> bool:
        if self._are_renamed is None:
            # Found out once: what a model saves does not change.
            self._are_renamed = not self._slots.keys() <= model_state_dict(self._model).keys()
        return self._are_renamed

    @contextmanager
    def _substituted(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Within it the model has other tensors in place of its parameters: no values move, no dtype changes."""
        forget_gathered(self._model)
        kept = {name: slot.current() for name, slot in self._slots.items()}
        try:
            for name, slot in self._slots.items():
                # Into the dict: a module's `setattr` refuses a plain tensor in the place of a parameter.
                slot.owner[slot.attribute] = values[name]
            yield
        finally:
            for name, slot in self._slots.items():
                slot.owner[slot.attribute] = kept[name]

    @torch.no_grad()
    def _overwrite(self, values: list[Tensor]) -> None:
        torch._foreach_copy_(self.tensors(), values)
        # What is gathered still has the old values.
        forget_gathered(self._model)


@dataclass(frozen=True, slots=True)
class _Slot:
    """A parameter or a buffer, and where it sits in the model."""

    owner: dict[str, Any]
    """The parameters, or the buffers, of its module by attribute."""
    attribute: str
    tensor: Tensor

    @property
    def kind(self) -> str:
        """In words."""
        return "parameter" if isinstance(self.tensor, nn.Parameter) else "buffer"

    def current(self) -> Tensor:
        """Return the live tensor. A module may have put another one in the place of a buffer."""
        if isinstance(self.tensor, nn.Parameter):
            return self.tensor
        there = self.owner.get(self.attribute)
        return there if isinstance(there, Tensor) else self.tensor

    def was_replaced(self) -> bool:
        """Whether the model has another parameter there, and not only what FSDP2 gathers: that has fewer mesh axes."""
        there = self.owner.get(self.attribute)
        if not isinstance(self.tensor, nn.Parameter):
            return not isinstance(there, Tensor)
        if there is self.tensor or not isinstance(there, nn.Parameter):
            return False
        return _mesh_ndim(there) >= _mesh_ndim(self.tensor)


def _trainable(model: nn.Module, tied: Mapping[str, str]) -> dict[str, _Slot]:
    """Clean FQN -> slot of each trainable floating-point parameter; of tied ones under the name that is kept."""
    slots: dict[str, _Slot] = {}
    for prefix, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad and parameter.is_floating_point():
                name = clean_fqn(f"{prefix}.{attribute}" if prefix else attribute, model)
                # Of tied weights the first module that has one is the slot.
                slots.setdefault(tied.get(name, name), _Slot(module._parameters, attribute, parameter))
    return slots


def _chosen_buffers(model: nn.Module, chosen: bool | Sequence[str]) -> dict[str, _Slot]:
    """Clean FQN -> slot of each floating-point buffer that is saved and chosen. Raises UsageError for idle patterns."""
    patterns = ["*"] if chosen is True else list(chosen or ())
    if not patterns:
        return {}
    transient = set(non_persistent_buffers(model))
    slots: dict[str, _Slot] = {}
    for prefix, module in model.named_modules():
        for attribute, buffer in module._buffers.items():
            name = clean_fqn(f"{prefix}.{attribute}" if prefix else attribute, model)
            if buffer is not None and buffer.is_floating_point() and name not in transient:
                slots[name] = _Slot(module._buffers, attribute, buffer)
    idle = [pattern for pattern in patterns if chosen is not True and not fnmatch.filter(slots, pattern)]
    if idle:
        there = ", ".join(sorted(slots)[:5]) or "none"
        raise UsageError(
            f"buffers={idle}: no floating-point buffer that is saved has such a name; there: {there}"
            + ", ..." * (len(slots) > 5)
        )
    return {name: slot for name, slot in slots.items() if any(fnmatch.fnmatchcase(name, one) for one in patterns)}


def _check_averageable(slots: Mapping[str, _Slot], is_fsdp1: bool) -> None:
    for name, slot in slots.items():
        if isinstance(slot.tensor, FlatParameter):
            raise UsageError(f"{name} is a flat parameter of FSDP1: build FSDP(..., use_orig_params=True)")
        if is_fsdp1 and slot.tensor.dtype != torch.float32:
            raise UsageError(
                f"{name} is {slot.tensor.dtype}: FSDP1 can save an average only through its own storage, which "
                "would round it. Keep the parameters in float32 and compute in MixedPrecision(param_dtype=...)"
            )


def _mesh_ndim(tensor: Tensor) -> int:
    return tensor.device_mesh.ndim if isinstance(tensor, DTensor) else 0
