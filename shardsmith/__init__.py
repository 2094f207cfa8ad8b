"""Shardsmith: the checkpoint layer of a sharded PyTorch training run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardsmith.manager import ShardedCheckpointManager

__all__ = ["ShardedCheckpointManager"]


def __getattr__(name: str) -> Any:
    """What is imported when it is asked for: the command line has to start at once."""
    if name in __all__:
        from shardsmith.manager import ShardedCheckpointManager

        return ShardedCheckpointManager
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
