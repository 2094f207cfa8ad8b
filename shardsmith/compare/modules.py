"""The modules of a sentence encoder beside its transformer, and what a checkpoint holds of each."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from shardsmith.formats.by_path import HUGGINGFACE
from shardsmith.formats.models import ModelSource
from shardsmith.formats.opened import OpenedCheckpoint, open_checkpoint
from shardsmith.hf.hf_directory import CONFIG_FILE
from shardsmith.hf.modules import Module, Modules


@dataclass(frozen=True, slots=True)
class HeldModule:
    """A module of one model of a checkpoint."""

    module: Module
    model: str
    """``main`` or ``ema``."""
    source: ModelSource
    """Its tensors, as the module's file names them; none where the checkpoint should have some."""

    @property
    def name(self) -> str:
        """What it is called beside the models."""
        return self.module.called(self.model)


def is_huggingface(checkpoint: OpenedCheckpoint) -> bool:
    """Return whether it says by itself what model it is."""
    return checkpoint.format == HUGGINGFACE and (checkpoint.path / CONFIG_FILE).is_file()


def with_modules(
    checkpoint: OpenedCheckpoint, other: Modules | None, opened: contextlib.ExitStack
) -> tuple[dict[str, ModelSource], list[HeldModule]]:
    """Return the models without tensors of modules, and the modules that are to be compared.

    Args:
        checkpoint: Any checkpoint; stays as it is.
        other: Those of the Hugging Face directory that it is compared with; None if that is none.
        opened: Closes the files that are opened here.

    Raises:
        CheckpointError: modules.json or the weights of a module cannot be read.
    """
    if is_huggingface(checkpoint):
        return checkpoint.models, _in_folders(checkpoint, other, opened)
    models, held = dict(checkpoint.models), []
    for model, source in checkpoint.models.items():
        for module, names in other.divide(source.specs, absent=True) if other is not None else ():
            held.append(HeldModule(module, model, source.only(names)))
            models[model] = models[model].without(names.values())
    return models, held


def _in_folders(checkpoint: OpenedCheckpoint, other: Modules | None, opened: contextlib.ExitStack) -> list[HeldModule]:
    own, held = Modules(checkpoint.path), []
    for module in own.with_weights:
        beside = open_checkpoint(checkpoint.path / module.folder)
        opened.callback(beside.close)
        held += [HeldModule(module, model, source) for model, source in beside.models.items()]
    # An encoder without one of the other's modules is another encoder; a bare transformer is a part of both.
    there = {one.name for one in held}
    for module in other.with_weights if other is not None and own.folders else ():
        empty = (HeldModule(module, model, source.only({})) for model, source in checkpoint.models.items())
        held += [one for one in empty if one.name not in there]
    return held
