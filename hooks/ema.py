"""An exponential moving average of the weights, sharded like the model."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.tensor import DTensor

from shardsmith.checking.arguments import checked
from shardsmith.checking.types import Count, Decay, StepNumber
from shardsmith.errors import UsageError
from shardsmith.ground.ranks import rank_and_size

from .hook import Hook
from .local_weights import LocalWeights, local
from .wiring import Parts

log = logging.getLogger(__name__)

_SAMPLED = 65_536
"""So many elements of a tensor are enough to say how far its average is."""


class EMA(Hook):
    """Keep a float32 average of the trainable floating-point weights, each rank of its own shards.

    Build it when the weights are on their device and sharded: after ``fully_shard``, FSDP, DDP or ``compile``. What is
    frozen then has no average, nor have buffers unless they are asked for: they are what the live model says. Tied
    weights have one.

    It starts from the weights at construction, or, if that comes later, at ``on_train_begin`` or at ``reset``.
    Each update moves it by ``average <- average + (1 - d) * (weight - average)``, where d is ``decay``.

    Args:
        decay: 0 <= decay < 1. At 0.999 a weight counts for about the last 1000 updates.
        warmup: Use d = min(decay, (1 + t) / (10 + t)) with t the number of updates so far, as ``num_updates`` of
            TensorFlow's ``tf.train.ExponentialMovingAverage``: a short run is not dominated by its start.
        start_step: If positive, the average is a copy of the weights before this step, and the first update at or
            after it is one more copy (and counts as an update).
        every_n_steps: Update at the multiples of this.
        buffers: Average floating-point buffers like weights, too: BatchNorm's running statistics, a router's
            ``expert_bias``. True for all that a state dict holds, or patterns of names: ``["*.running_*"]``.
        offload: Hold the averages in CPU memory; each update then waits for the device and copies the weights there.
        on_other_decay: What to do if a checkpoint holds an average that was made with another decay: ``"raise"``, or
            ``"continue"`` from it with ``decay``.

    Attributes:
        updates: Number of updates so far.
    """

    @checked
    def __init__(
        self,
        model: nn.Module,
        *,
        decay: Decay = 0.999,
        warmup: bool = False,
        start_step: StepNumber = 0,
        every_n_steps: Count = 1,
        buffers: bool | Sequence[str] = False,
        offload: bool = False,
        on_other_decay: Literal["raise", "continue"] = "raise",
    ) -> None:
        self.decay = decay
        self.warmup = warmup
        self.start_step = start_step
        self.every_n_steps = every_n_steps
        self.offload = offload
        self.on_other_decay = on_other_decay
        self.updates = 0
        self._model = model
        self._weights = LocalWeights(model, buffers)
        self.parts = Parts(model=model, find_problems=self._find_changes)
        self._average: dict[str, Tensor] = {}
        for name, weight in self._weights.found.items():
            device = torch.device("cpu") if offload else weight.device
            # A copy even where dtype and device are the same, or the average would be the weight itself.
            self._average[name] = weight.detach().to(device, torch.float32, copy=True)
        self._trained = sum(parameter.requires_grad for parameter in model.parameters())
        self._was_loaded = False
        self._swapped_in = False
        self._stagings = 0
        self.before_changes: list[Callable[[], None]] = []

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
        """Move the average toward the weights, in place. All ranks; no communication.

        Waits for the device with ``offload`` only.

        Raises:
            UsageError: while the average is swapped in or copied, or when the model's parameters were replaced.
        """
        self._refuse_while_in_use("update the average")
        averages, weights = self._averages(), self._weights.tensors()
        if self._has_started:
            lerp_(averages, weights, 1 - self._current_decay())
        else:
            # The first update at or after `start_step` is a copy.
            torch._foreach_copy_(averages, weights)
        self.updates += 1

    @torch.no_grad()
    def reset(self) -> None:
        """Start over: set the average to the weights as they are now, with no update. All ranks; no communication."""
        self._refuse_while_in_use("reset the average")
        torch._foreach_copy_(self._averages(), self._weights.tensors())
        self.updates = 0

    @torch.no_grad()
    def distance(self) -> float:
        """Estimate how far the average is from the weights: the length of the difference over that of the weights.

        From at most 131,071 elements of each tensor, as far as this rank holds them. Any rank; no communication; waits
        for the device. Not while the average is swapped in.
        """
        if not self._has_started:
            return 0.0
        squares = [
            _squares(*pair) for pair in zip(self._averages(), self._weights.tensors(), strict=True) if pair[0].numel()
        ]
        apart, whole = torch.stack(squares).sum(0).tolist() if squares else (0.0, 0.0)
        return math.sqrt(apart / whole) if whole else 0.0

    def facts(self) -> dict[str, float | int | bool]:
        """Return what a checkpoint records of the average in it."""
        return {**self.settings(), "updates": self.updates}

    def settings(self) -> dict[str, float | int | bool]:
        """Return how the average is made. ``buffers``, the number of averaged ones, is left out without any."""
        settings: dict[str, float | int | bool] = {
            "decay": self.decay,
            "warmup": self.warmup,
            "start_step": self.start_step,
            "every_n_steps": self.every_n_steps,
        }
        return {**settings, "buffers": len(self._weights.buffers)} if self._weights.buffers else settings

    @torch.no_grad()
    def model_state_dict(self) -> dict[str, Tensor]:
        """Return clean FQN -> average, for ``torch.distributed.checkpoint``. All ranks; communicates under FSDP1.

        The tensors are the averages themselves (a DTensor under FSDP2, plain under DDP) and change with the next
        update. Copies they are under FSDP1 (DTensor or ShardedTensor), and where the model saves other tensors than it
        trains, such as the parts of a fused projection; making those may communicate.
        """
        self._follow_weights()
        if not self._weights.is_fsdp1:
            return self._weights.by_saved_names(self._average)
        # FSDP1 makes a state dict of its own storage only: so the averages pass through the live weights.
        with self._weights.replaced_by(self._averages()):
            options = StateDictOptions(cpu_offload=self.offload)
            state: dict[str, Any] = get_model_state_dict(self._model, options=options)
            # what FSDP1 does not shard is the live weight itself, and is about to change back
            return {name: state[name].clone() if type(state[name]) is Tensor else state[name] for name in self._average}

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resume needs (torch's ``Stateful``). All ranks; communicates as ``model_state_dict``."""
        return {"model": self.model_state_dict(), **self.counters()}

    def counters(self) -> dict[str, Tensor]:
        """Return what ``state_dict`` has beside the averages. No communication."""
        return {
            "updates": torch.tensor(self.updates, device="cpu"),
            "decay": torch.tensor(self.decay, dtype=torch.float64, device="cpu"),
        }

    @checked
    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any], *, allow_other_decay: bool = False) -> None:
        """Restore the average from a ``state_dict``. All ranks; communicates as ``model_state_dict`` does.

        Also after ``torch.distributed.checkpoint.load``, which has filled the tensors of a ``state_dict`` in place.

        Args:
            state_dict: The value of ``state_dict()``, of this class.
            allow_other_decay: Accept an average that was made with another decay, and go on with ours.

        Raises:
            UsageError: when names, shapes, sharding or decay differ. The averages are as they were before this call.
        """
        self._refuse_while_in_use("load an average")
        if missing := [key for key in ("decay", "updates", "model") if key not in state_dict]:
            raise UsageError(f"this is no state_dict() of EMA: it has no {', '.join(missing)}. Nothing was loaded")
        decay, loaded = float(state_dict["decay"]), state_dict["model"]
        # Compared exactly: it was saved as float64.
        if decay != self.decay and not allow_other_decay and self.on_other_decay == "raise":
            raise UsageError(
                f"the average to load has decay {decay}, this one {self.decay}: build EMA(..., decay={decay}), "
                "or pass allow_other_decay=True to load_state_dict"
            )
        if self._weights.is_fsdp1:
            self._load_fsdp1(loaded)
        else:
            _check_alike(self._weights.by_saved_names(self._average), loaded)
            self._weights.load_by_saved_names(self._average, loaded)
        self.updates = int(state_dict["updates"])
        # Even with no update: `on_train_begin` must not start it over.
        self._was_loaded = True

    @property
    def is_swapped_in(self) -> bool:
        """Whether the live weights are the average right now."""
        return self._swapped_in

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Exchange the live weights for the average, cast to their dtype; restore them exactly at the end.

        All ranks; no communication. Costs one copy of the local weights. Not between a forward and its backward.

        Raises:
            UsageError: when they are swapped in already, or while the average is copied (``staging``).
        """
        self._refuse_while_in_use("swap the average in")
        self._follow_weights()
        with self._weights.replaced_by(self._averages()):
            self._swapped_in = True
            try:
                yield
            finally:
                self._swapped_in = False

    @contextmanager
    def staging(self) -> Iterator[None]:
        """Let nothing change weights or average through this object within the context: enter it to copy them.

        Raises:
            UsageError: while the average is swapped in, because the live weights are not the weights then.
        """
        if self._swapped_in:
            raise UsageError("cannot copy the model's state while the average is swapped in: leave swapped_in() first")
        self._warn_of_changes()
        self._stagings += 1
        try:
            yield
        finally:
            self._stagings -= 1

    def _warn_of_changes(self) -> None:
        """Say once what trains by now and has no average: a save or an export has its weights as they are."""
        trained = sum(parameter.requires_grad for parameter in self._model.parameters())
        if trained > self._trained and (changes := self._find_changes()) and rank_and_size()[0] == 0:
            log.warning("%s. A save or an export of the average has the weights of it as they are", changes[0])
        self._trained = max(trained, self._trained)

    def _find_changes(self) -> list[str]:
        changes = self._weights.find_changes()
        if not changes:
            return []
        more = f", and {len(changes) - 3} more" if len(changes) > 3 else ""
        advice = "Make EMA when the model is complete: after what changes it, and before what freezes a part of it"
        return [f"{'; '.join(changes[:3])}{more}. {advice}"]

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
            self._announce_change()
            torch._foreach_copy_(self._averages(), self._weights.tensors())

    def _averages(self) -> list[Tensor]:
        return [local(average) for average in self._average.values()]

    def _load_fsdp1(self, loaded: Mapping[str, Tensor]) -> None:
        """Let FSDP1, which alone knows the way into its flat shards, load into the weights, and take it from there."""
        with self._weights.replaced_by(self._averages()):
            # All keys, as `set_model_state_dict` also wants those that have no average.
            state: dict[str, Any] = get_model_state_dict(self._model)
            _check_alike({name: state[name] for name in self._average}, loaded)
            # It wants each name of a tied weight, too; the saved state has the kept one.
            aliases = {alias: loaded[kept] for alias, kept in self._weights.tied.items() if kept in loaded}
            set_model_state_dict(self._model, {**state, **loaded, **aliases})
            torch._foreach_copy_(self._averages(), self._weights.tensors())

    def _refuse_while_in_use(self, action: str) -> None:
        if self._swapped_in:
            raise UsageError(f"cannot {action} while the average is swapped in: leave swapped_in() first")
        if self._stagings:
            raise UsageError(f"cannot {action} while a save or an export copies the state: leave staging() first")
        # A copy that runs beside the training ends before the average changes.
        self._announce_change()

    def _announce_change(self) -> None:
        for act in self.before_changes:
            act()


def lerp_(averages: list[Tensor], weights: list[Tensor], fraction: float) -> None:
    """Move each average by ``fraction`` of its distance to the weight, in place. Any dtype and device of weights."""
    ready = [a.dtype == w.dtype and a.device == w.device for a, w in zip(averages, weights, strict=True)]
    if any(ready):
        # One kernel for many tensors; both of a pair must have the same dtype and device.
        pairs = [(a, w) for a, w, is_ready in zip(averages, weights, ready, strict=True) if is_ready]
        torch._foreach_lerp_([a for a, _ in pairs], [w for _, w in pairs], fraction)
    # the rest one by one, so that the casts cost one tensor and not one copy of the model
    for average, weight, is_ready in zip(averages, weights, ready, strict=True):
        if not is_ready:
            average.lerp_(weight.to(average), fraction)


def _squares(average: Tensor, weight: Tensor) -> Tensor:
    """Sums of squares of the difference and of the weight, on the CPU, estimated from every so many-th element."""
    # That is `(numel // _SAMPLED) | 1`.
    apart = average.numel() // _SAMPLED | 1  # odd: not the same columns of every row
    one, other = average.reshape(-1)[::apart].double(), weight.reshape(-1)[::apart]
    other = other.to(one.device).double()
    # Each element that was taken stands for `apart` of them.
    return torch.stack([(one - other).square().sum(), other.square().sum()]).cpu() * apart


def _check_alike(ours: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> None:
    """All differences at once, as a UsageError."""
    problems = [f"{name}: not in what was loaded" for name in ours.keys() - loaded.keys()]
    problems += [
        f"{name}: not in this model, frozen, or a buffer without EMA(buffers=...)"
        for name in loaded.keys() - ours.keys()
    ]
    for name in ours.keys() & loaded.keys():
        if _layout(ours[name]) != _layout(loaded[name]):
            problems.append(f"{name}: loaded {_layout(loaded[name])}, the average is {_layout(ours[name])}")
    if problems:
        lines = "\n  ".join(sorted(problems))
        raise UsageError(f"{len(problems)} averages do not fit:\n  {lines}\nGo through state_dict() and dcp.load.")


def _layout(tensor: Tensor) -> tuple[object, ...]:
    sharding = (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else ()
    return (tuple(tensor.shape), *sharding)
