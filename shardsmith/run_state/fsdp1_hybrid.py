"""Optimizer state of FSDP1 with hybrid sharding and flat parameters, which torch cannot collect by itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, _optim_utils


@contextlib.contextmanager
def hybrid_groups_have_a_source(model: nn.Module) -> Iterator[None]:
    """Within it torch's functions for the optimizer state of this model work under hybrid sharding. Main thread only.

    Up to torch 2.13 they broadcast from global rank 0 within every shard group, which fails in the groups that it is
    not in ("Global rank 0 is not part of group"); meant is the first rank of each. With ``use_orig_params=True`` they
    do not broadcast. This may go when torch asks for ``group_src=0``.
    """
    modules = [m for m in model.modules() if isinstance(m, FullyShardedDataParallel)]
    if all(module._use_orig_params for module in modules):  # or there are none
        yield
        return
    utils: Any = _optim_utils
    original = utils.dist
    utils.dist = _FromFirstOfGroup()
    try:
        yield
    finally:
        utils.dist = original


class _FromFirstOfGroup:
    """``torch.distributed``, but for the source of broadcasts."""

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def broadcast_object_list(self, objects: list[Any], src: int, group: dist.ProcessGroup | None = None) -> None:
        assert src == 0
        dist.broadcast_object_list(objects, group=group, group_src=0)

    def broadcast(self, tensor: Any, src: int, group: dist.ProcessGroup | None = None) -> None:
        assert src == 0
        dist.broadcast(tensor, group=group, group_src=0)
