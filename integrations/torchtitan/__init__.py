"""Shardsmith in TorchTitan, 0.2 and 0.3, without a change to its code.

0.3: ``--override.imports 'shardsmith.integrations.torchtitan.checkpoint_hooks={"ema_decay": 0.999}'``
0.2: a table ``[checkpoint_hooks]`` in the job's TOML, and ``-m shardsmith.integrations.torchtitan`` for
``-m torchtitan.train``
"""

from .options import CheckpointHooks
from .override import checkpoint_hooks

__all__ = ["CheckpointHooks", "checkpoint_hooks"]
