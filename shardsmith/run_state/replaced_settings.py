"""Settings of optimizers and schedulers that a resume replaces: a new ``lr`` in the script has no effect."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

log = logging.getLogger(__name__)

_MOVED = ("lr", "betas", "momentum")
"""Options that a scheduler changes as the run goes on."""
_COUNTERS = ("last_epoch", "T_cur", "T_i", "best", "num_bad_epochs", "cooldown_counter")
_SHOWN = 6


@contextmanager
def replacements_told(optimizers: Sequence[Optimizer], scheduler: Any) -> Iterator[None]:
    """Log which settings are others after the body than before. On the rank that tells; no communication."""
    before = _settings(optimizers, scheduler)
    yield
    after = _settings(optimizers, scheduler)
    changes = [f"{name} {after[name]} (here {value})" for name, value in before.items() if after.get(name) != value]
    if changes:
        more = f" and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else ""
        log.info("settings of the checkpoint replace those of this run: %s%s", ", ".join(changes[:_SHOWN]), more)


def _settings(optimizers: Sequence[Optimizer], scheduler: Any) -> dict[str, str]:
    found: dict[str, str] = {}
    for number, optimizer in enumerate(optimizers):
        name = "optimizer" if len(optimizers) == 1 else f"optimizer {number}"
        for i, group in enumerate(optimizer.param_groups):
            place = name if len(optimizer.param_groups) == 1 else f"{name} group {i}"
            # With a scheduler these change by themselves, and are no news.
            skipped = ("params", *_MOVED) if scheduler is not None else ("params",)
            found |= {f"{place}: {key}": str(value) for key, value in group.items() if key not in skipped}
    # Of other classes it is not known what they count.
    if isinstance(scheduler, LRScheduler):
        found |= {f"scheduler: {key}": str(value) for key, value in _fixed(scheduler.state_dict()).items()}
    return found


def _fixed(state: Mapping[str, Any]) -> dict[str, Any]:
    """What a scheduler was made with, and not what it counts."""
    kinds: Any = int | float | str | list | tuple | None
    return {
        key: value
        for key, value in state.items()
        if isinstance(value, kinds) and not key.startswith("_") and key not in _COUNTERS
    }
