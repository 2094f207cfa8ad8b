"""Settings in which TorchTitan cannot resume from the steps that it saves, with and without the hooks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from .inner import find_held
from .override import HAS_OVERRIDES

_SCHEDULE = "InterleavedZeroBubble"


def find_lost_resumes(trainer: Any, model_parts: Sequence[nn.Module]) -> str | None:
    """Return why steps of this run cannot be resumed from, in words; None if nothing is known of that.

    Args:
        trainer: TorchTitan's; anything else has no pipeline.
        model_parts: The model on this rank.
    """
    if not HAS_OVERRIDES:
        if any(find_held(part) is not None for part in model_parts):
            return "TorchTitan 0.2 finds no names for the optimizer's state of its transformers_modeling_backend"
        return None
    parallelism = getattr(getattr(trainer, "config", None), "parallelism", None)
    is_cut = getattr(parallelism, "pipeline_parallel_degree", 1) > 1
    if is_cut and getattr(parallelism, "pipeline_parallel_schedule", None) == _SCHEDULE:
        return f"with the pipeline schedule {_SCHEDULE} TorchTitan gives the last norm no gradient, so it has no state"
    return None
