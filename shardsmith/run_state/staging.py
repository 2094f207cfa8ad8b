"""A copy of the state in CPU memory, made while the training waits, so that it can be written while it goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions


class Stager:
    """Copies nested state dicts into buffers that later copies use again: stage the next when the former is written."""

    def __init__(self) -> None:
        on_accelerator = torch.accelerator.is_available()
        options = StagingOptions(
            use_pinned_memory=on_accelerator,
            use_shared_memory=False,
            use_async_staging=False,
            use_non_blocking_copy=on_accelerator,
        )
        self._stager = DefaultStager(options)

    def stage(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of tensors and everything else, on the CPU. Returns when it is made; no communication."""
        staged = self._stager.stage(_without_sharded(state))
        assert isinstance(staged, dict), "staging was asked to finish before it returns"
        return _with_sharded(staged, state)

    def close(self) -> None:
        """Free the buffers."""
        self._stager.close()


def _without_sharded(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state without ShardedTensors, which torch's stager cannot copy."""
    return {
        name: _without_sharded(value) if isinstance(value, Mapping) else value
        for name, value in state.items()
        if not isinstance(value, ShardedTensor)
    }


def _with_sharded(staged: dict[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """Put them back as they are: only FSDP1 makes them, anew at each call for its state, so nobody changes them."""
    for name, value in state.items():
        if isinstance(value, ShardedTensor):
            staged[name] = value
        elif isinstance(value, Mapping):
            _with_sharded(staged[name], value)
    return staged
