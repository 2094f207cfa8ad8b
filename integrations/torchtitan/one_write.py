"""TorchTitan's step folders as Hugging Face directories: the weights are written once, and read back from there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from torchtitan.config import TORCH_DTYPE_MAP

from shardsmith.errors import CheckpointError, UsageError
from shardsmith.formats.dcp.load import load_into
from shardsmith.hooks.options import SaveWeights
from shardsmith.manifest.metadata import find_metadata
from shardsmith.name_maps.maps import NameMap
from shardsmith.tensors.dtypes import dtype_name

from .lora import find_lora
from .options import CheckpointHooks


def refuse_unfit(model: nn.Module, options: CheckpointHooks, last_dtype: str | None) -> None:
    """Raise UsageError if the weights of a run cannot be in Hugging Face files alone. No communication.

    Args:
        model: The model that trains.
        options: The options that the user set.
        last_dtype: TorchTitan's ``export_dtype`` where its last step has weights alone, in that dtype; None if not.
    """
    if not options.one_write:
        return
    if adapted := list(find_lora(model)):
        raise UsageError(
            f'checkpoint_hooks: weights="huggingface": {adapted[0]} and {len(adapted) - 1} more layers have adapters '
            "of LoRA, for which files of the model have no names: leave it out, and let export_interval write the "
            "adapter or the merged model beside the steps"
        )
    wanted = None if last_dtype is None else TORCH_DTYPE_MAP[last_dtype]
    # TorchTitan casts the weights of its last step, and these files must hold what trains.
    floating = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if wanted is not None and floating - {wanted}:
        raise UsageError(
            f'checkpoint_hooks: weights="huggingface" writes the dtype that trains '
            f"({', '.join(map(dtype_name, floating))}), but the last step has weights only, in "
            f"checkpoint.export_dtype={last_dtype}: set that to the dtype that trains, last_save_model_only off, or "
            "last_save_in_hf on"
        )


def files_of(options: CheckpointHooks, base: Path, names: str | NameMap) -> SaveWeights:
    """Return what the step folders have of a Hugging Face directory."""
    return SaveWeights(
        weights="huggingface",
        base_model=base,
        names=names,
        max_shard_size=options.export_max_shard_size,
        weights_dtype=None if options.weights_dtype == "original" else options.weights_dtype,
    )


def is_one_write(checkpoint: Path) -> bool:
    """Return whether the weights of a checkpoint are in Hugging Face files, of which its index of DCP says nothing."""
    try:
        metadata = find_metadata(checkpoint)
    except CheckpointError:
        return False
    return metadata is not None and metadata.weights is not None


def load(state_dict: dict[str, Any], checkpoint: Path, states: dict[str, Any]) -> None:
    """What TorchTitan's ``dcp_load`` does, with such a checkpoint. All ranks; communicates.

    Args:
        state_dict: What TorchTitan wants; tensors are filled in place.
        checkpoint: The directory.
        states: TorchTitan's own, among them its model.

    Raises:
        MismatchError: it does not hold that. Nothing was loaded.
        CheckpointError: it cannot be read.
    """
    # As with dcp.load, a step may be of another dtype than the run.
    load_into(state_dict, checkpoint, allow_cast=True)
    if "model" in states:
        states["model"].load_state_dict(state_dict)
