"""What a checkpoint needs of an average of the weights, and an average that is a model of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from shardsmith.checking.arguments import checked
from shardsmith.checking.types import Decay, StepNumber
from shardsmith.errors import UsageError
from shardsmith.sharding.gathered import forget_gathered


class Average(Protocol):
    """An average that is saved and resumed, such as the EMA hook."""

    decay: float
    updates: int

    def state_dict(self) -> dict[str, Any]:
        """``model``: FQN -> tensor; ``updates`` and ``decay``: 0-dim tensors. All ranks; may communicate (FSDP1)."""
        ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` gave. All ranks; may communicate (FSDP1)."""
        ...

    def reset(self) -> None:
        """Start over: it is the live weights as they are now, with no update."""
        ...

    def facts(self) -> dict[str, Any]:
        """Return what a reader of a checkpoint wants to know about it."""
        ...

    def staging(self) -> contextlib.AbstractContextManager[None]:
        """Within it nothing changes it through this object."""
        ...


def refuse_other_decay(path: Path, saved: float, average: Average) -> None:
    """Raise UsageError if an average was made with another decay than this one has, and nothing says to go on."""
    # Exactly: it was saved as float64, or as a number in JSON.
    if saved != average.decay and getattr(average, "on_other_decay", "raise") == "raise":
        raise UsageError(
            f"{path} holds an average with decay {saved}, this one has decay {average.decay}. Nothing was loaded; "
            f'use decay {saved}, or go on with {average.decay}: EMA(..., on_other_decay="continue"), '
            "in ema_options of the Trainer's CheckpointHooks; or leave the average out: parts= of resume(), "
            "load_ema=False of the manager"
        )


class ModuleAverage:
    """An average in a second module with sharding of its own, as BAGEL's training keeps it.

    Whoever trains updates it, and counts that here: ``average.updates += 1``.

    Attributes:
        module: The averaged model.
        decay: Of each update.
        start_step: Step before which it was a copy of the weights.
        updates: Number of updates so far.
    """

    @checked
    def __init__(self, module: nn.Module, *, decay: Decay, start_step: StepNumber = 0, updates: StepNumber = 0) -> None:
        """Raises UsageError if the decay is none."""
        self.module = module
        self.decay = decay
        self.start_step = start_step
        self.updates = updates

    def state_dict(self) -> dict[str, Any]:
        """As ``Average.state_dict``; the tensors are those of the module (copies under FSDP1)."""
        state: Mapping[str, Any] = get_model_state_dict(self.module)
        return {
            "model": {name: value for name, value in state.items() if isinstance(value, Tensor)},
            "updates": torch.tensor(self.updates, device="cpu"),
            "decay": torch.tensor(self.decay, dtype=torch.float64, device="cpu"),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As ``Average.load_state_dict``."""
        set_model_state_dict(self.module, dict(state_dict["model"]))
        # What FSDP has gathered has the old values.
        forget_gathered(self.module)
        self.updates = int(state_dict["updates"])

    def reset(self) -> None:
        """Nothing does this to a module."""
        raise UsageError("an average in a module of its own is loaded into that module")

    def facts(self) -> dict[str, Any]:
        """As those of the EMA hook."""
        return {
            "decay": self.decay,
            "warmup": False,
            "start_step": self.start_step,
            "every_n_steps": 1,
            "updates": self.updates,
        }

    def staging(self) -> contextlib.AbstractContextManager[None]:
        """Whoever trains does not update it during a save."""
        return contextlib.nullcontext()
