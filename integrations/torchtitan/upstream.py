"""What of TorchTitan's checkpoint manager is built on, where its versions have it, and whether it is still there.

A method that TorchTitan renames would be a hook of ours that is never called, without an error. So the names and
parameters that are relied on are compared when the hooks are attached.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from shardsmith.errors import UsageError

try:
    from torchtitan.components.checkpointer import CheckpointManager  # from 0.3 on
except ImportError:
    from torchtitan.components.checkpoint import CheckpointManager  # 0.2

__all__ = ["CheckpointManager", "refuse_unknown"]

_CALLED = {
    "load": ("step",),
    "save": ("curr_step", "last_step"),
    "close": (),
    "dcp_save": ("state_dict", "checkpoint_id"),
    "dcp_load": ("state_dict", "checkpoint_id"),
    "_find_load_step": ("folder",),
    "_purge_stale_checkpoints": (),
    "_should_save": ("curr_step", "last_step"),
    "_create_checkpoint_id": ("step",),
    "_flattened_model_states_sd": (),
}
"""Methods that are overridden or called, and the parameters by which they are."""
_KEYWORDS = {"dcp_save": "to_hf", "dcp_load": "from_hf"}
"""Parameters that decide what a call means."""


def differences(manager: type[Any]) -> list[str]:
    """Return what a manager of TorchTitan lacks of what is relied on, one line each; empty if nothing."""
    lines = []
    for name, parameters in _CALLED.items():
        method = getattr(manager, name, None)
        if not callable(method):
            lines.append(f"there is no {name}")
            continue
        known = inspect.signature(method).parameters
        if _hands_on(known.values()):
            continue
        wanted = [*parameters, *([_KEYWORDS[name]] if name in _KEYWORDS else [])]
        lines += [f"{name} has no parameter {parameter}" for parameter in wanted if parameter not in known]
    return lines


def _hands_on(parameters: Iterable[inspect.Parameter]) -> bool:
    """Whether a method takes whatever it is given, as one does that a script has put around TorchTitan's."""
    return {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} <= {each.kind for each in parameters}


def refuse_unknown(manager: type[Any] = CheckpointManager) -> None:
    """Raise UsageError unless TorchTitan's manager has all that the hooks rely on."""
    if lines := differences(manager):
        text = "\n  ".join(["this version of TorchTitan is not supported: its CheckpointManager has changed", *lines])
        raise UsageError(f"checkpoint_hooks: {text}\nTake TorchTitan 0.2.2 or 0.3.0, or a newer version of shardsmith.")
