"""What a trainer failed to load from the files that transformers wrote, loaded after all."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor, nn

from shardsmith.errors import CheckpointError
from shardsmith.formats import open_source
from shardsmith.live_boxes import held_boxes
from shardsmith.name_maps import Translation
from shardsmith.names import unwrapped
from shardsmith.tensors import TensorSpec, read_into
from shardsmith.transformers_names import TransformersNames


def reload(model: nn.Module, live: Mapping[str, Tensor], folder: Path, names: Collection[str]) -> bool:
    """Fill live tensors from a folder of ``save_pretrained``, whose names and tensors are not those in memory.

    For models that transformers converts when it saves (fused experts, one by one in files): some trainers load the
    files as they are, and what finds no name of its own keeps its values. No communication; each rank fills its boxes.

    Args:
        live: The model's tensors by clean FQN, sharing memory with it.
        names: Which to fill.

    Returns:
        Whether they were filled; False if transformers converts nothing of this model, or the folder has other files.
    """
    name_map = TransformersNames.of_model(unwrapped(model))
    if name_map is None or not set(names) <= live.keys():
        return False
    specs = {name: TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in live.items()}
    translation = Translation(name_map, specs)
    try:
        source = open_source(folder)
    except CheckpointError:
        return False
    try:
        if not {name for name, part in translation.slices.items() if part.source in names} <= source.specs.keys():
            return False
        for held in held_boxes({name: live[name] for name in names}):
            for target, box, values in translation.to_targets(held.name, held.box, held.values):
                read_into(source, target, box, values)
    finally:
        source.close()
    return True
