"""What a step's metadata.json says of the names that its weights have in Hugging Face files.

So ``to-hf``, ``verify`` and ``diagnose`` know them without TorchTitan, and also where the job has changed its model
in a way that no flavor has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from shardsmith.errors import CheckpointError, UsageError
from shardsmith.ground.ranks import Ranks
from shardsmith.ground.remote_path import as_path
from shardsmith.hf.hf_directory import read_config
from shardsmith.hooks.stages import names_on_all
from shardsmith.load.live_weights import model_state_dict
from shardsmith.name_maps.maps import NameMap
from shardsmith.name_maps.recorded import slices_to_plain
from shardsmith.tensors.dtypes import dtype_name
from shardsmith.tensors.fqn import clean_fqn
from shardsmith.tensors.tensors import TensorSpec

from .inner import InnerNames
from .names import TorchTitanNames
from .options import CheckpointHooks


def names_to_record(model: nn.Module, sd_adapter: Any, options: CheckpointHooks, ranks: Ranks) -> dict[str, Any] | None:
    """Return them on rank 0, as ``metadata.json`` has them; None on the others. All ranks; communicates.

    None on rank 0, too, where a weight has no name, as those of an adapter of LoRA.

    Args:
        model: What this rank has of the model.
        sd_adapter: TorchTitan's state-dict adapter; None without one.
        options: The options that the user set.
        ranks: Those that train.
    """
    # Of all stages: an adapter may drop buffers, and only those.
    buffers = names_on_all(ranks, [clean_fqn(name, model) for name, _ in model.named_buffers()])

    def find(parts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any] | None]:
        specs = {
            name: TensorSpec(name, tuple(shape), getattr(torch, dtype))
            for part in parts
            for name, (shape, dtype) in part.items()
        }
        # One answer for each rank; only rank 0 writes the manifest.
        nobody: list[dict[str, Any] | None] = [None] * ranks.size
        try:
            names = _names(model, sd_adapter, buffers, options)
            return nobody if names is None else [slices_to_plain(names.targets(specs), {}), *nobody[1:]]
        except (CheckpointError, UsageError):
            return nobody

    return ranks.deal("recording names of the weights", lambda: _tensors(model), find, large=True)


def _names(model: nn.Module, sd_adapter: Any, buffers: list[str], options: CheckpointHooks) -> NameMap | None:
    if sd_adapter is None:
        return InnerNames.of(model)
    return TorchTitanNames(sd_adapter, buffers, _config(sd_adapter, options))


def _config(sd_adapter: Any, options: CheckpointHooks) -> dict[str, Any] | None:
    """config.json of the files, whose class decides on some names; None where there is none."""
    named = options.export_base_model or getattr(sd_adapter, "hf_assets_path", None)
    try:
        return read_config(as_path(named)) if named else None
    except CheckpointError:
        return None


def _tensors(model: nn.Module) -> dict[str, Any]:
    """Global shape and dtype by name. As JSON."""
    return {name: [list(t.shape), dtype_name(t.dtype)] for name, t in model_state_dict(model).items()}
