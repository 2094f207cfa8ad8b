"""An exponential moving average of the weights, sharded like the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.fsdp._flat_param import FlatParameter
from torch.distributed.fsdp._runtime_utils import _reshard as reshard_fsdp1
from torch.distributed.tensor import DTensor

from shardsmith.errors import UsageError
from shardsmith.names import clean_fqn, tied_weights

from .base import Hook


class EMA(Hook):
    """Keeps a float32 average of the trainable floating-point weights, each rank of its own shards.

    Build it when the weights are on their device and sharded: after ``fully_shard``, FSDP, DDP or ``compile``. What is
    frozen then, and all buffers, have no average: they are what the live model says. Tied weights have one.

    It starts from the weights at construction, or, if that comes later, at ``on_train_begin`` or at ``reset``.
    Each update moves it by ``average <- average + (1 - d) * (weight - average)``, where d is ``decay``.

    Args:
        decay: 0 <= decay < 1. At 0.999 a weight counts for about the last 1000 updates.
        warmup: Use d = min(decay, (1 + t) / (10 + t)) with t the number of updates so far, as ``num_updates`` of
            TensorFlow's ``tf.train.ExponentialMovingAverage``: a short run is not dominated by its start.
        start_step: If positive, the average is a copy of the weights before this step, and the first update at or
            after it is one more copy (and counts as an update).
        every_n_steps: Update at the multiples of this.
        offload: Hold the averages in CPU memory; each update then copies the weights there.

    Attributes:
        updates: Number of updates so far.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        decay: float = 0.999,
        warmup: bool = False,
        start_step: int = 0,
        every_n_steps: int = 1,
        offload: bool = False,
    ) -> None:
        if not 0 <= decay < 1:
            raise UsageError(f"decay={decay}: it is at least 0 and below 1; 1 would never move the average")
        if start_step < 0 or every_n_steps < 1:
            raise UsageError(f"start_step={start_step} is at least 0, every_n_steps={every_n_steps} at least 1")
        self.decay = decay
        self.warmup = warmup
        self.start_step = start_step
        self.every_n_steps = every_n_steps
        self.offload = offload
        self.updates = 0
        self._model = model
        self._is_fsdp1 = any(isinstance(module, FullyShardedDataParallel) for module in model.modules())
        _forget_gathered(model)
        self._tied = tied_weights(model)
        self._slots = _trainable(model, self._tied)
        _check_averageable(self._slots, self._is_fsdp1)
        self._average: dict[str, Tensor] = {}
        for name, slot in self._slots.items():
            device = torch.device("cpu") if offload else slot.parameter.device
            self._average[name] = slot.parameter.detach().to(device, torch.float32, copy=True)
        self._was_loaded = False
        self._swapped_in = False
        self._stagings = 0

    def on_train_begin(self, step: int) -> None:  # noqa: ARG002
        """Start from the weights as they are now, unless an average was loaded. All ranks; no communication."""
        if self.updates == 0 and not self._was_loaded:
            self.reset()

    def on_optimizer_step(self, step: int) -> None:
        """Update the average if it is time. All ranks, after ``optimizer.step()``; no communication."""
        if step >= self.start_step and step % self.every_n_steps == 0:
            self.update()

    @torch.no_grad()
    def update(self) -> None:
        """Move the average toward the weights, in place. All ranks; no communication, no wait for the device.

        Raises:
            UsageError: while the average is swapped in or copied, or when the model's parameters were replaced.
        """
        self._refuse_while_in_use("update the average")
        averages, weights = self._averages(), self._weights()
        if self._has_started:
            lerp_(averages, weights, 1 - self._current_decay())
        else:
            torch._foreach_copy_(averages, weights)
        self.updates += 1

    @torch.no_grad()
    def reset(self) -> None:
        """Start over: the average is the weights as they are now, with no update. All ranks; no communication."""
        self._refuse_while_in_use("reset the average")
        torch._foreach_copy_(self._averages(), self._weights())
        self.updates = 0

    def facts(self) -> dict[str, float | int | bool]:
        """What a reader of a checkpoint wants to know about the average in it."""
        return {
            "decay": self.decay,
            "warmup": self.warmup,
            "start_step": self.start_step,
            "every_n_steps": self.every_n_steps,
            "updates": self.updates,
        }

    @torch.no_grad()
    def model_state_dict(self) -> dict[str, Tensor]:
        """Clean FQN -> average, fit for ``torch.distributed.checkpoint``. All ranks; communicates under FSDP1 only.

        The tensors are the averages themselves (a DTensor under FSDP2, plain under DDP) and change with the next
        update; only under FSDP1 are they copies (DTensor or ShardedTensor).
        """
        self._follow_weights()
        if not self._is_fsdp1:
            return dict(self._average)
        with self._replaced_weights():
            options = StateDictOptions(cpu_offload=self.offload)
            state: dict[str, Any] = get_model_state_dict(self._model, options=options)
            # what FSDP1 does not shard is the live weight itself, and is about to change back
            return {name: state[name].clone() if type(state[name]) is Tensor else state[name] for name in self._average}

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on (torch's ``Stateful``). All ranks; communicates under FSDP1 only."""
        return {
            "model": self.model_state_dict(),
            "updates": torch.tensor(self.updates),
            "decay": torch.tensor(self.decay, dtype=torch.float64),
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any], *, allow_other_decay: bool = False) -> None:
        """Go on from what ``state_dict`` gave. All ranks; communicates under FSDP1 only.

        Also after ``torch.distributed.checkpoint.load``, which has filled the tensors of a ``state_dict`` in place.

        Args:
            allow_other_decay: Accept an average that was made with another decay, and go on with ours.

        Raises:
            UsageError: when names, shapes, sharding or decay differ. The averages are as they were before this call.
        """
        self._refuse_while_in_use("load an average")
        decay, loaded = float(state_dict["decay"]), state_dict["model"]
        if decay != self.decay and not allow_other_decay:
            raise UsageError(
                f"the average to load has decay {decay}, this one {self.decay}: build EMA(..., decay={decay}), "
                "or pass allow_other_decay=True to load_state_dict"
            )
        if self._is_fsdp1:
            self._load_fsdp1(loaded)
        else:
            _check_alike(self._average, loaded)
            torch._foreach_copy_(self._averages(), [_local(loaded[name]) for name in self._average])
        self.updates = int(state_dict["updates"])
        self._was_loaded = True

    @property
    def is_swapped_in(self) -> bool:
        """Whether the live weights are the average right now."""
        return self._swapped_in

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within it the live weights are the average, cast to their dtype; then they are back, bit for bit.

        All ranks; no communication. Costs one copy of the local weights. Not between a forward and its backward.

        Raises:
            UsageError: when they are swapped in already, or while the average is copied (``staging``).
        """
        self._refuse_while_in_use("swap the average in")
        self._follow_weights()
        with self._replaced_weights():
            self._swapped_in = True
            try:
                yield
            finally:
                self._swapped_in = False

    @contextmanager
    def staging(self) -> Iterator[None]:
        """Within it nothing changes the weights or the average through this object: enter it to copy them.

        Raises:
            UsageError: while the average is swapped in, because the live weights are not the weights then.
        """
        if self._swapped_in:
            raise UsageError("cannot copy the model's state while the average is swapped in: leave swapped_in() first")
        self._stagings += 1
        try:
            yield
        finally:
            self._stagings -= 1

    @property
    def _has_started(self) -> bool:
        return self.updates > 0 or self.start_step == 0

    def _current_decay(self) -> float:
        if not self.warmup:
            return self.decay
        return min(self.decay, (1 + self.updates) / (10 + self.updates))

    @torch.no_grad()
    def _follow_weights(self) -> None:
        """Keep the promise that the average is a copy of the weights until ``start_step``."""
        if not self._has_started and not self._swapped_in:
            torch._foreach_copy_(self._averages(), self._weights())

    def _averages(self) -> list[Tensor]:
        return [_local(average) for average in self._average.values()]

    def _weights(self) -> list[Tensor]:
        """This rank's live weights in the order of ``_average``. Looked up each time: FSDP may move them."""
        weights = []
        for name, slot in self._slots.items():
            weight = _local(slot.parameter)
            if slot.was_replaced() or weight.shape != _local(self._average[name]).shape:
                raise UsageError(f"{name} is no longer the parameter that EMA was built with: build EMA after sharding")
            weights.append(weight)
        return weights

    @contextmanager
    def _replaced_weights(self) -> Iterator[None]:
        with torch.no_grad():
            kept = [weight.clone() for weight in self._weights()]
        try:
            self._overwrite_weights(self._averages())
            yield
        finally:
            self._overwrite_weights(kept)

    @torch.no_grad()
    def _overwrite_weights(self, values: list[Tensor]) -> None:
        torch._foreach_copy_(self._weights(), values)
        _forget_gathered(self._model)

    def _load_fsdp1(self, loaded: Mapping[str, Tensor]) -> None:
        """Let FSDP1, which alone knows the way into its flat shards, load into the weights, and take it from there."""
        with self._replaced_weights():
            state: dict[str, Any] = get_model_state_dict(self._model)
            _check_alike({name: state[name] for name in self._average}, loaded)
            aliases = {alias: loaded[kept] for alias, kept in self._tied.items() if kept in loaded}
            set_model_state_dict(self._model, {**state, **loaded, **aliases})
            torch._foreach_copy_(self._averages(), self._weights())

    def _refuse_while_in_use(self, action: str) -> None:
        if self._swapped_in:
            raise UsageError(f"cannot {action} while the average is swapped in: leave swapped_in() first")
        if self._stagings:
            raise UsageError(f"cannot {action} while a save or an export copies the state: leave staging() first")


def lerp_(averages: list[Tensor], weights: list[Tensor], fraction: float) -> None:
    """Move each average by ``fraction`` of its distance to the weight, in place. Any dtype and device of weights."""
    ready = [a.dtype == w.dtype and a.device == w.device for a, w in zip(averages, weights, strict=True)]
    if any(ready):
        pairs = [(a, w) for a, w, is_ready in zip(averages, weights, ready, strict=True) if is_ready]
        torch._foreach_lerp_([a for a, _ in pairs], [w for _, w in pairs], fraction)
    # the rest one by one, so that the casts cost one tensor and not one copy of the model
    for average, weight, is_ready in zip(averages, weights, ready, strict=True):
        if not is_ready:
            average.lerp_(weight.to(average), fraction)


@dataclass(frozen=True, slots=True)
class _Slot:
    """A parameter and where it sits in the model."""

    module: nn.Module
    attribute: str
    parameter: nn.Parameter

    def was_replaced(self) -> bool:
        """Whether the model has another parameter there, and not only what FSDP2 gathers: that has fewer mesh axes."""
        current = self.module._parameters.get(self.attribute)
        if current is self.parameter or not isinstance(current, nn.Parameter):
            return False
        return _mesh_ndim(current) >= _mesh_ndim(self.parameter)


def _trainable(model: nn.Module, tied: Mapping[str, str]) -> dict[str, _Slot]:
    """Clean FQN -> slot of each trainable floating-point parameter; of tied ones under the name that is kept."""
    slots: dict[str, _Slot] = {}
    for prefix, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad and parameter.is_floating_point():
                name = clean_fqn(f"{prefix}.{attribute}" if prefix else attribute, model)
                slots.setdefault(tied.get(name, name), _Slot(module, attribute, parameter))
    return slots


def _check_averageable(slots: Mapping[str, _Slot], is_fsdp1: bool) -> None:
    if not slots:
        raise UsageError("the model has no trainable floating-point parameter: there is nothing to average")
    for name, slot in slots.items():
        if isinstance(slot.parameter, FlatParameter):
            raise UsageError(f"{name} is a flat parameter of FSDP1: build FSDP(..., use_orig_params=True)")
        if slot.parameter.is_meta:
            raise UsageError(f"{name} is on the meta device: build EMA after the weights are there")
        if is_fsdp1 and slot.parameter.dtype != torch.float32:
            raise UsageError(
                f"{name} is {slot.parameter.dtype}: FSDP1 can save an average only through its own storage, which "
                "would round it. Keep the parameters in float32 and compute in MixedPrecision(param_dtype=...)"
            )


def _check_alike(ours: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> None:
    """All differences at once, as a UsageError."""
    problems = [f"{name}: not in what was loaded" for name in ours.keys() - loaded.keys()]
    problems += [f"{name}: not in this model, or frozen" for name in loaded.keys() - ours.keys()]
    for name in ours.keys() & loaded.keys():
        if _layout(ours[name]) != _layout(loaded[name]):
            problems.append(f"{name}: loaded {_layout(loaded[name])}, the average is {_layout(ours[name])}")
    if problems:
        lines = "\n  ".join(sorted(problems))
        raise UsageError(f"{len(problems)} averages do not fit:\n  {lines}\nGo through state_dict() and dcp.load.")


def _layout(tensor: Tensor) -> tuple[object, ...]:
    sharding = (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else ()
    return (tuple(tensor.shape), *sharding)


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor is local already. Shares memory. Call it without grad."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _mesh_ndim(tensor: Tensor) -> int:
    return tensor.device_mesh.ndim if isinstance(tensor, DTensor) else 0


def _forget_gathered(model: nn.Module) -> None:
    """Drop the weights that FSDP has gathered and kept for its next forward: the shards behind them have changed.

    Without communication. After a forward without a backward, at least those of the root module are still there.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
        elif isinstance(module, FullyShardedDataParallel) and _may_have_gathered(module):
            reshard_fsdp1(module, module._handle, True)


def _may_have_gathered(module: FullyShardedDataParallel) -> bool:
    """Not before the first forward, which sets ``_is_root``, and not with NO_SHARD. FSDP1 refuses to reshard then."""
    handle = module._handle
    return handle is not None and handle.uses_sharded_strategy and module._is_root is not None
