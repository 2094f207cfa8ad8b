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


def tell_mixed(optimizers: Sequence[Optimizer], names: Mapping[int, str], saved: Mapping[str, Any]) -> None:
    """Log which options the parameters of one group of this run were saved with several values of. No communication.

    A group has one value of each, so some parameters go on with that of others.

    Args:
        optimizers: After the load.
        names: FQN of each parameter, by ``id``.
        saved: ``param_groups.<fqn>.<option>`` -> value, and whatever else.
    """
    lines = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            own = [names[id(parameter)] for parameter in group["params"] if id(parameter) in names]
            for option in group.keys() - {"params"}:
                keys = [key for name in own if (key := f"param_groups.{name}.{option}") in saved]
                values = dict.fromkeys(str(saved[key]) for key in keys)
                if len(values) > 1:
                    lines.append(f"{option} {' and '.join(values)} (now {group[option]}), from {own[0]} on")
    if lines:
        more = f" and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
        log.warning(
            "parameters that are in one group of the optimizer here were saved with several settings: %s%s. To go on "
            "as before, make the groups that were saved, before resume()",
            ", ".join(sorted(lines)[:_SHOWN]),
            more,
        )


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
