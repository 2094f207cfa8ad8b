"""TorchTitan 0.3: an override of its config of checkpoints, from the command line or in a config registry."""

from __future__ import annotations

from typing import Any

from shardsmith.errors import UsageError

from .options import CheckpointHooks, parse

try:
    from torchtitan.config.override import override as _override
except ModuleNotFoundError:  # 0.2, or no TorchTitan at all
    _override = None

HAS_OVERRIDES = _override is not None
"""Whether this TorchTitan is of the generation that builds its parts from their configs."""


def checkpoint_hooks(config: Any, **options: Any) -> Any:
    """TorchTitan's config of checkpoints, with hooks attached to what it builds.

    From the command line:

        --override.imports 'shardsmith.integrations.torchtitan.checkpoint_hooks={"ema_decay": 0.999}'

    or in a function of a config registry:

        config.checkpoint = checkpoint_hooks(config.checkpoint, ema_decay=0.999, export_interval=1000)

    Args:
        config: Of ``torchtitan.components.checkpointer.CheckpointManager``; hooks that it has already stay as they are
            but for the options given.
        options: The fields of ``CheckpointHooks``.

    Raises:
        UsageError: an option is not known, or does not fit; or it is the config of another manager.
    """
    if not HAS_OVERRIDES:
        raise UsageError(
            "this TorchTitan has no overrides. In 0.2, write a table [checkpoint_hooks] in the job's TOML and start "
            "-m shardsmith.integrations.torchtitan"
        )
    from .manager_0_3 import HookedCheckpointManager, hooked_config

    is_ours = isinstance(config, HookedCheckpointManager.Config)
    return hooked_config(config, parse(options, config.hooks if is_ours else CheckpointHooks()))


checkpoint_hooks.__module__ = __package__  # the name by which users know it, and under which it is registered

if _override is not None:
    # of every manager: TorchTitan only warns of an override without a target, and others are refused by name
    from torchtitan.components.checkpointer import BaseCheckpointManager

    _override(target=BaseCheckpointManager.Config, description="Checkpoint hooks of Shardsmith")(checkpoint_hooks)
