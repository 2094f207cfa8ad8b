"""Weights that FSDP keeps beside its shards."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.fsdp._runtime_utils import _reshard as reshard_fsdp1


def forget_gathered(model: nn.Module) -> None:
    """Drop the weights that FSDP has gathered and kept for its next forward: the shards behind them have changed.

    Without communication. After a forward without a backward, at least those of the root module are still there.
    Call it after every load into FSDP1, too: see ``_move_to_pinned``.
    """
    for module in model.modules():
        # FSDP2's reshard frees what is gathered; without anything gathered it does nothing.
        if isinstance(module, FSDPModule):
            module.reshard()
        elif isinstance(module, FullyShardedDataParallel):
            if _may_have_gathered(module):
                reshard_fsdp1(module, module._handle, True)
            elif _has_unused_copy(module):
                _move_to_pinned(module)


def _may_have_gathered(module: FullyShardedDataParallel) -> bool:
    """Not before the first forward, which sets ``_is_root``, and not with NO_SHARD. FSDP1 refuses to reshard then."""
    handle = module._handle
    return handle is not None and handle.uses_sharded_strategy and module._is_root is not None


def _has_unused_copy(module: FullyShardedDataParallel) -> bool:
    """With CPUOffload and NO_SHARD, which one rank always has: between FSDP1's first use and its first forward."""
    handle = module._handle
    if handle is None or not handle._offload_params or module._is_root is None:
        return False
    # Two memories on one device: FSDP1 has made its pinned copy and still computes from the old one.
    pinned, used = handle.flat_param._local_shard, handle.flat_param.data
    return used.device == pinned.device and used.data_ptr() != pinned.data_ptr()


def _move_to_pinned(module: FullyShardedDataParallel) -> None:
    """FSDP1 has copied the weights into pinned memory, goes on with the old, and drops that, with what was loaded."""
    flat = module._handle.flat_param  # type: ignore[union-attr]
    with torch.no_grad():
        flat._local_shard.copy_(flat.data)
    reshard_fsdp1(module, module._handle, False)
