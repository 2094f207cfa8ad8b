"""What a trainer failed to load from the files that transformers wrote, loaded after all."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import nn

from shardsmith.errors import CheckpointError
from shardsmith.formats.by_path import open_source
from shardsmith.load.live_weights import LiveWeights
from shardsmith.name_maps.restored import RestoredModel
from shardsmith.name_maps.transformers import TransformersNames
from shardsmith.tensors.fqn import unwrapped


def reload(model: nn.Module, folder: Path, names: Iterable[str]) -> bool:
    """Fill tensors of a live model from a folder of ``save_pretrained``, whose tensors are not those in memory.

    For models that transformers converts when it saves (fused experts, one by one in files): a trainer that loads the
    files as they are leaves out what it finds no name for. All ranks; communicates under FSDP1 only.

    Args:
        model: The live model, wrapped and sharded.
        folder: A folder of ``save_pretrained``.
        names: Clean FQNs of what to fill.

    Returns:
        Whether they were filled; False if transformers converts nothing of this model, or the folder has other files.
    """
    # Without the files first: most models are not converted at all.
    if TransformersNames.of_model(unwrapped(model)) is None:
        return False
    live = LiveWeights(model)
    specs = {name: spec for name, spec in live.specs.items() if name not in live.tied}
    try:
        source = open_source(folder)
    except CheckpointError:
        return False
    try:
        name_map = TransformersNames.of_model(unwrapped(model), source.specs)
        assert name_map is not None
        restored = RestoredModel(source, name_map, specs, live.tied)
        for name in names:
            live.fill(name, restored, name)
        live.store()
    except CheckpointError:
        return False
    finally:
        source.close()
    return True
