"""Models whose state dict has other names than their parameters, such as the parts of a fused projection.

torch's ``get_model_state_dict`` looks each name up as an attribute and refuses those; the model's own hooks know them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel

from shardsmith.load.live_weights import model_state_dict
from shardsmith.sharding.gathered import forget_gathered
from shardsmith.tensors.fqn import clean_fqn


def read_model(model: nn.Module) -> dict[str, Any]:
    """Return a model's state dict by clean FQN, sharded. All ranks; communicates as its hooks, or FSDP1, do."""
    state = None if _is_fsdp1(model) else model_state_dict(model)
    return dict(get_model_state_dict(model)) if state is None or not _has_other_names(model, state) else state


def write_model(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Inverse of ``read_model``."""
    if _is_fsdp1(model) or not _has_other_names(model, state):
        set_model_state_dict(model, dict(state))
        # What FSDP has gathered has the old values.
        forget_gathered(model)
        return
    names = {clean_fqn(name, model): name for name in model.state_dict()}
    model.load_state_dict({names[name]: value for name, value in state.items()})


def _is_fsdp1(model: nn.Module) -> bool:
    return any(isinstance(module, FullyShardedDataParallel) for module in model.modules())


def _has_other_names(model: nn.Module, state: Mapping[str, Any]) -> bool:
    named = itertools.chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    own = {clean_fqn(name, model) for name, _ in named}
    return any(name not in own and not name.endswith("_extra_state") for name in state)
