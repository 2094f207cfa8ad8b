"""The weights of a checkpoint as Hugging Face directories, for ``ShardedSave(weights="huggingface")``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shardsmith.conversion.model_directory import find_model
from shardsmith.errors import UsageError
from shardsmith.export.live import LiveModel
from shardsmith.ground.layout import EMA_PREFIX
from shardsmith.ground.ranks import Ranks
from shardsmith.ground.remote_path import RemotePath
from shardsmith.hf.hf_directory import protect
from shardsmith.run_state.contents import Contents
from shardsmith.run_state.weight_files import WeightFiles, WeightsDirectory
from shardsmith.tensors.checkpoint_keys import EMA as AVERAGE
from shardsmith.tensors.checkpoint_keys import MAIN
from shardsmith.tensors.dtypes import cast_specs, parse_dtypes
from shardsmith.tensors.tensors import TensorSpec

from .adapters import view_of
from .ema import EMA
from .held import HeldView
from .live_directory import LiveDirectory, ModelFiles
from .live_state import LiveState
from .options import ExportFiles, SaveWeights, SaveWriting
from .view import View

log = logging.getLogger(__name__)

AVERAGE_FOLDER = "ema"
"""In a checkpoint: the directory of the average's weights."""


class HuggingFaceWeights:
    """Plans, for each save, the directories that its weights go to."""

    def __init__(
        self,
        model: nn.Module,
        ema: EMA | None,
        options: SaveWeights,
        directory: Path,
        ranks: Ranks,
        *,
        stages: bool = False,
        facts: Mapping[str, Callable[[], Any]] | None = None,
    ) -> None:
        """Read the base model, and compare it with the model that trains. All ranks; communicates.

        Args:
            model: The model that trains.
            ema: The average to save, too.
            options: What lies in the directories.
            directory: Where the checkpoints are.
            ranks: All ranks of the run.
            stages: The model is a stage of a pipeline, and other ranks have the others.
            facts: As ``extra_facts`` of ``ExportFiles``.

        Raises:
            UsageError: the model, or its average, cannot be written so.
            RankFailedError, CheckpointError: the base model cannot be read, or does not fit.
        """
        _refuse_loss(model, options)
        base: list[Path] = []
        if options.base_model is not None:
            name = str(options.base_model)
            ranks.gather("finding the base model", lambda: base.append(find_model(name, fetch=False)))
            # Any step stands for all: none may go where the base model is.
            protect(directory / "step-0", base[0])
        self._is_leader = ranks.is_leader
        self._view = _view_of(model, options)
        self._state = LiveState(
            model,
            ema,
            ModelFiles.of(_as_export_files(options, facts), base[0] if base else None),
            dtype=options.weights_dtype or "original",
            max_shard_size=options.max_shard_size,
            names=options.names,
            view=self._view,
        )
        ranks.gather("reading the base model", self._state.read_files)
        if ema is not None and (apart := self._state.own_places()):
            raise UsageError(
                f'weights="huggingface": its files need both of {"; ".join(map(" and ".join, apart.items()))}, which '
                "are one tensor in this model, and the average has one of them. Leave weights= out, and write these "
                "files with HFExport or shardsmith to-hf"
            )
        self._stages = self._state.unite(ranks) if stages else None
        stem = self._state.stem if self._view is None else self._view.stem
        self._directories = [LiveDirectory("", {MAIN: stem})]
        if ema is not None:
            self._directories.append(LiveDirectory(AVERAGE_FOLDER, {AVERAGE: stem}))
        ranks.gather("looking at the base model", lambda: self._state.check(compare=ranks.is_leader))

    def added_to(self, contents: Contents, target: Path) -> Contents:
        """Return what is saved, with the plan of its weights. All ranks; communicates under FSDP1."""
        directories = [self._directory(directory, contents, target) for directory in self._directories]
        tied = contents.tied if self._stages is None else self._stages.aliases  # every rank has the same plan
        return replace(contents, weights=WeightFiles(directories, tied))

    def _directory(self, directory: LiveDirectory, contents: Contents, target: Path) -> WeightsDirectory:
        (live,) = models = self._state.models(directory)
        if self._is_leader:  # which writes the config
            self._state.follow(models)
        # Key in the state dict of this save -> the name that the plan begins with.
        names = dict(self._names(directory, live, contents.state_dict))
        plan = self._state.plan(target, contents.step, directory, [live.plan])
        own = live.tensors if self._stages is None else self._stages.specs
        dtypes = {name: tensor.dtype for name, tensor in own.items()}
        if self._stages is not None and AVERAGE in directory.stems:
            # An average is float32, whatever the weights are.
            dtypes |= dict.fromkeys(self._stages.averaged, torch.float32)
        return WeightsDirectory.of(directory.suffix, plan, live.translation, names, dtypes)

    def _names(self, directory: LiveDirectory, live: LiveModel, state: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Key in the state -> name that the model's plan starts from, of all that the files hold."""
        left_out = live.translation.left_out if live.translation is not None else {}
        if self._stages is None:
            average = frozenset(state.get("ema_model", {}))
            own = [key for key, value in state.items() if isinstance(value, Tensor)]
            there: Collection[str] = live.tensors
        else:
            average, own, there = self._stages.averaged, list(self._stages.specs), self._stages.specs
        if AVERAGE not in directory.stems:
            average = frozenset()
        own = [*dict.fromkeys([*own, *average])]
        named = {key: key for key in own} if self._view is None else self._view.names(own)
        for fqn, name in named.items():
            if name in there and name not in left_out:
                yield EMA_PREFIX + fqn if fqn in average else fqn, name


def refuse_together(files: SaveWeights, writing: SaveWriting, directory: Path) -> None:
    """Raise UsageError if options of ``ShardedSave`` do not go together, or not with its directory."""
    if isinstance(directory, RemotePath):
        if files.weights == "huggingface":
            raise UsageError(
                f'ShardedSave: weights="huggingface" is for disks only, and {directory} is in an object store, '
                "where ranks cannot write at any place of one file: leave it out, and add an HFExport to that store, "
                "or convert single steps with shardsmith to-hf"
            )
        if writing.latest_link:
            raise UsageError(
                f"ShardedSave: latest_link=True is for disks only, and {directory} is in an object store, which has no "
                "links: leave it out"
            )
    elif writing.local_cache is not None:
        raise UsageError(
            f"local_cache= is for runs that save to an object store, and {directory} is on a disk: leave it out"
        )
    changed = [f.name for f in fields(files) if f.name != "weights" and getattr(files, f.name) != f.default]
    if files.weights == "dcp" and changed:
        names = ", ".join(f"{name}=" for name in changed)
        raise UsageError(f'ShardedSave: {names} is for weights="huggingface"; pass that, too, or leave it out')
    if files.weights == "huggingface" and writing.layout == "nested":
        raise UsageError(
            'ShardedSave: layout="nested" is about keys in DCP files, and weights="huggingface" puts none there; '
            "leave one of the two out"
        )


def _refuse_loss(model: nn.Module, options: SaveWeights) -> None:
    """Raise UsageError unless the files, with what lies beside them, can hold what the model has, bit for bit."""
    if options.weights_dtype is None:
        return
    own = [*model.named_parameters(), *model.named_buffers()]
    specs = [TensorSpec(name, tuple(value.shape), value.dtype) for name, value in own]
    pairs = zip(specs, cast_specs(specs, parse_dtypes(options.weights_dtype)), strict=True)
    # What `float32-rest` can make up for; it cannot for any other two dtypes.
    exact = (torch.float32, torch.bfloat16)
    lost = [(spec, cast) for spec, cast in pairs if spec.dtype != cast.dtype and (spec.dtype, cast.dtype) != exact]
    if lost:
        spec, cast = lost[0]
        raise UsageError(
            f"ShardedSave: weights_dtype={options.weights_dtype!r}: {len(lost)} of {len(specs)} tensors are "
            f"of another dtype, such as {spec.name} ({str(spec.dtype)[6:]} for {str(cast.dtype)[6:]}), and would not "
            'come back bit for bit; only float32 beside "bfloat16" does. Leave it out, and cast a step where it is '
            "served: shardsmith to-hf --checkpoint STEP --base-model STEP --output-dir SERVED; or let HFExport write "
            "in that dtype beside the saves"
        )


def _view_of(model: nn.Module, options: SaveWeights) -> View | None:
    """Raises UsageError for what is written in another form than it is trained in."""
    view = view_of(model, "adapter", held=options.names == "auto")
    if view is not None and not isinstance(view, HeldView):
        raise UsageError(
            'weights="huggingface": a model of peft is saved as DCP; export its adapter beside that with HFExport'
        )
    return view


def _as_export_files(options: SaveWeights, facts: Mapping[str, Callable[[], Any]] | None) -> ExportFiles:
    return ExportFiles(
        base_model=options.base_model,
        processor=options.processor,
        extra_files=options.extra_files,
        extra_facts=facts,
        trust_remote_code=options.trust_remote_code,
    )
