"""The checkpoint manager of TorchTitan 0.3 with hooks. Imports TorchTitan."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.config.override import derive

from shardsmith.errors import UsageError

from .manager import HookedManager
from .options import CheckpointHooks


class HookedCheckpointManager(HookedManager):
    """What ``checkpoint_hooks`` makes TorchTitan build."""

    @dataclass(kw_only=True, slots=True)
    class Config(CheckpointManager.Config):
        """TorchTitan's, and the hooks."""

        hooks: CheckpointHooks = field(default_factory=CheckpointHooks)
        """Checkpoint hooks of Shardsmith."""

    def __init__(self, config: Config, **parts: Any) -> None:
        """As TorchTitan's. Raises what attaching hooks raises, on all ranks."""
        super().__init__(config, **parts)
        self.attach(config.hooks, config, parts)


def hooked_config(config: Any, hooks: CheckpointHooks) -> Any:
    """Return a config of TorchTitan's checkpoint manager that builds one with hooks.

    Raises:
        UsageError: it is one of another manager, which this would replace without a word.
    """
    if type(config) not in (CheckpointManager.Config, HookedCheckpointManager.Config):
        raise UsageError(
            f"checkpoint_hooks attaches to TorchTitan's own CheckpointManager; this run has {type(config).__qualname__}"
        )
    return derive(config, HookedCheckpointManager.Config, hooks=hooks)
