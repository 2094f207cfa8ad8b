"""Weights that FSDP keeps gathered beside its shards."""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.fsdp._runtime_utils import _reshard as reshard_fsdp1


def forget_gathered(model: nn.Module) -> None:
    """Drop the weights that FSDP has gathered and kept for its next forward: the shards behind them have changed.

    Without communication. After a forward without a backward, at least those of the root module are still there.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
        elif isinstance(module, FullyShardedDataParallel) and _may_have_gathered(module):
            reshard_fsdp1(module, module._handle, True)


def _may_have_gathered(module: FullyShardedDataParallel) -> bool:
    """Not before the first forward, which sets ``_is_root``, and not with NO_SHARD. FSDP1 refuses to reshard then."""
    handle = module._handle
    return handle is not None and handle.uses_sharded_strategy and module._is_root is not None
