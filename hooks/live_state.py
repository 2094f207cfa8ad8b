"""What a run's Hugging Face directories hold: live weights under the names of the files, and everything beside them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from shardsmith.export.live import LiveModel
from shardsmith.export.plan import origin_of
from shardsmith.formats.by_path import known_checkpoint
from shardsmith.formats.matched import renamed
from shardsmith.formats.models import ModelSource, TranslatedModel
from shardsmith.ground.commit import writing
from shardsmith.ground.ranks import Ranks
from shardsmith.ground.sizes import parse_size
from shardsmith.hf.directory import DirectoryPlan, ModelPlan, Origin, plan_model
from shardsmith.hf.hf_directory import main_stem
from shardsmith.hf.live_config import settings_of
from shardsmith.live.recognition import own_tensors
from shardsmith.load.live_weights import model_state_dict
from shardsmith.manifest.model_settings import ModelSettings, settings_of_step
from shardsmith.name_maps.maps import NameMap, Translation, find_name_map
from shardsmith.name_maps.matching import Alignment
from shardsmith.name_maps.transformers import TransformersNames
from shardsmith.sharding.live_boxes import address_of
from shardsmith.sharding.local_boxes import local, local_boxes
from shardsmith.tensors.checkpoint_keys import EMA as AVERAGE
from shardsmith.tensors.checkpoint_keys import MAIN
from shardsmith.tensors.dtypes import parse_dtypes
from shardsmith.tensors.fqn import (
    clean_fqn,
    refuse_without_values,
    tied_weights,
    unwrapped,
)
from shardsmith.tensors.tensors import Shape, TensorSpec

from .adapters import HeldAdapter
from .ema import EMA
from .encoder_modules import EncoderModules
from .fitted_config import FittedConfig
from .held import HeldView
from .known_plan import KnownPlan
from .live_directory import LiveDirectory, ModelFiles
from .stages import Stages
from .view import View

log = logging.getLogger(__name__)


class LiveState:
    """Model and average as they are at the moment of asking, and the plan of what they become."""

    def __init__(
        self,
        model: nn.Module,
        ema: EMA | None,
        files: ModelFiles,
        *,
        dtype: str | torch.dtype | Mapping[str, str | torch.dtype],
        max_shard_size: str | int | None,
        names: str | NameMap = "auto",
        view: View | None = None,
    ) -> None:
        """``view``: of a model of peft, or one that is held.

        Raises UsageError if torch knows no such dtype, or the size cannot be read.
        """
        self._model = model
        self._ema = ema
        self._files = files
        self._dtype = parse_dtypes(dtype)
        self._max_shard_size = max_shard_size
        if max_shard_size is not None:
            parse_size(max_shard_size)
        self._names = names
        self._view = view
        self._inner = unwrapped(model) if view is None else view.inner
        self._config = FittedConfig(model, self._inner, files)
        # what the class computes, and save_pretrained leaves out: sinusoidal positions, for one
        self._unsaved = frozenset(getattr(self._inner, "_keys_to_ignore_on_save", None) or ())
        self._name_map: NameMap | None = None
        self._translated: tuple[dict[str, Shape], Translation] | None = None
        self._stages: Stages | None = None
        self._known: dict[str, KnownPlan] = {}  # by suffix of the directory

    def read_files(self) -> None:
        """Read what lies beside the weights. First of all, on every rank; no communication. Raises CheckpointError."""
        # Only for a base model: asking a view under FSDP1 may make a module inside a root of its own.
        self._config.read(self._own_specs() if self._files.base is not None else {})
        self._modules = EncoderModules(self._model, self._files.base)
        self._name_map = self._find_name_map()

    def _own_specs(self) -> dict[str, TensorSpec]:
        """The parameters, by their names in the files."""
        own = {clean_fqn(name, self._model): p for name, p in self._model.named_parameters()}
        if self._view is not None:
            own |= {new: own[fqn] for fqn, new in self._view.names(own).items()}
        return {name: TensorSpec(name, tuple(p.shape), p.dtype) for name, p in own.items()}

    @property
    def stem(self) -> str:
        """What the files of the main weights are called. After ``read_files``."""
        return main_stem(self._config.content)

    def unite(self, ranks: Ranks) -> Stages:
        """From now on the files hold what all ranks together have: each has a stage of a pipeline.

        After ``read_files``. All ranks, main thread; communicates.

        Raises:
            RankFailedError: on all ranks, if two of them have tensors of one name that are not alike.
        """
        with self.staging():
            self._stages = Stages.of(ranks, self._own_stage)
        return self._stages

    def _own_stage(self) -> Stages:
        main = {name: value for name, value in model_state_dict(self._model).items() if isinstance(value, Tensor)}
        own, _, aliases = self._named(MAIN, main, None, self._aliases())
        averaged: frozenset[str] = frozenset()
        if self._ema is not None:
            averaged = frozenset(own) - self._named(AVERAGE, main, self._ema.model_state_dict(), self._aliases())[1]
        return Stages({n: TensorSpec(n, tuple(t.shape), t.dtype) for n, t in own.items()}, dict(aliases), averaged)

    def _aliases(self) -> dict[str, str]:
        return self._view.ties() if isinstance(self._view, HeldView | HeldAdapter) else tied_weights(self._model)

    def own_places(self) -> dict[str, str]:
        """Return what is one tensor in memory and two in the files, alias -> kept name. After ``read_files``."""
        aliases = self._aliases()
        names = {name: name for tie in aliases.items() for name in tie}
        names = names if self._view is None else self._view.names(names)
        return self._config.own_places({names[alias]: names[kept] for alias, kept in aliases.items() if alias in names})

    @contextlib.contextmanager
    def staging(self) -> Iterator[None]:
        """Within it nothing of ours changes weights or average."""
        with contextlib.ExitStack() as held:
            if self._view is not None:
                held.enter_context(self._view.ready(self._ema))
            if self._ema is not None:
                held.enter_context(self._ema.staging())
            yield

    def models(self, directory: LiveDirectory) -> list[LiveModel]:
        """Return what goes into one directory. All ranks; communicates as ``model_state_dict``. Shares memory.

        As long as the model and its average consist of the same tensors, the plans are the same objects.
        """
        average = self._ema.model_state_dict() if self._ema is not None and AVERAGE in directory.stems else {}
        known = self._known.get(directory.suffix)
        # The same plans again: others would make the exporter ask all ranks once more who writes what.
        if known is not None and (models := known.models(self._model, average)) is not None:
            return models
        refuse_without_values(self._model)
        aliases = self._aliases()
        main = {name: value for name, value in model_state_dict(self._model).items() if isinstance(value, Tensor)}
        own = own_tensors(self._model, main) if self._view is None else None
        models = [
            self._live_model(name, stem, own or main, average if name == AVERAGE else None, aliases)
            for name, stem in directory.stems.items()
        ]
        if own is not None:  # which FSDP1 never gives, so that all ranks communicate or none
            self._known[directory.suffix] = KnownPlan.of(self._model, models, average)
        return models

    def replicated(self, models: Sequence[LiveModel]) -> dict[str, Tensor]:
        """Return the tensors, by model and name, of which several ranks may hold the same part, buffers left out.

        DDP lets buffers go apart. What is the same tensor in main weights and average is there once.
        """
        buffers = {clean_fqn(name, self._model) for name, _ in self._model.named_buffers()}
        if self._view is not None:
            buffers |= set(self._view.names(buffers).values())
        seen: dict[int, str] = {}
        tensors: dict[str, Tensor] = {}
        for model in models:
            prefix = "" if model.plan.model == MAIN else f"{model.plan.model}."
            for name, tensor in model.tensors.items():
                if name not in buffers and seen.setdefault(id(tensor), prefix + name) == prefix + name:
                    tensors[prefix + name] = tensor
        return tensors

    def changed_by_steps(self, models: Sequence[LiveModel]) -> dict[int, tuple[str, Tensor]]:
        """Return names and tensors that only an optimizer's step changes, and the average after it, by address.

        Buffers change in the forward.
        """
        buffers = {address_of(local(buffer)) for buffer in self._model.buffers()}
        return {
            address_of(values): (name if model.plan.model == MAIN else f"{model.plan.model}.{name}", tensor)
            for model in models
            for name, tensor in model.tensors.items()
            for _, values in local_boxes(tensor)
            if address_of(values) not in buffers
        }

    def plan(self, output: Path, step: int, directory: LiveDirectory, models: Sequence[ModelPlan]) -> DirectoryPlan:
        """Return the directory of one step. All ranks, main thread; communicates where extra facts do."""
        facts = self._ema.facts() if self._ema is not None and AVERAGE in directory.stems else None
        origin = Origin(output.parent.name, step=step, ema=facts)
        # Now: by the time that the files are written, the run may say otherwise.
        return self._plan(output, models, origin, settings_of(self._inner), self._files.ask())

    def plan_checkpoint(
        self, checkpoint: Path, output: Path, directory: LiveDirectory, *, compare: bool
    ) -> tuple[DirectoryPlan, dict[str, ModelSource | TranslatedModel]]:
        """The same directory from a checkpoint of the run, and its weights by model. Any thread; no communication.

        Raises:
            CheckpointError: it cannot be read; or, with ``compare``, names or shapes are not those of the base model's
                weights.
        """
        with contextlib.ExitStack() as opened:
            known = known_checkpoint(checkpoint)
            settings = settings_of_step(known.path) or settings_of(self._inner)
            sources: dict[str, ModelSource | TranslatedModel] = {}
            for name in directory.stems:
                source = self._known_names(known.open(name))
                opened.callback(source.close)
                sources[name] = source if self._name_map is None else TranslatedModel(source, self._name_map)
            models = [
                self._plan_model(name, stem, sources[name].specs, sources[name].aliases, sources[name].filled)
                for name, stem in directory.stems.items()
            ]
            if compare:
                for model in models:
                    self._config.fit(checkpoint, model, settings.config, sources[model.model])
            origin = origin_of(known)
            if AVERAGE not in directory.stems:
                origin = replace(origin, ema=None)
            opened.pop_all()
        return self._plan(output, models, origin, settings), sources

    def _known_names(self, source: ModelSource) -> ModelSource:
        """The tensors of a checkpoint of the run, under the names of the model that the module holds."""
        if self._view is not None:
            names, aliases = self._view.names(source.specs), self._view.names(source.aliases)
            found = Alignment({new: own for own, new in names.items()}, {new: own for own, new in aliases.items()})
            source = renamed(source, found)
        return source.untied(self._config.own_places(source.aliases))

    def check(self, *, compare: bool) -> None:
        """Plan an export, if anything could speak against it. All ranks; communicates as ``models`` does.

        Raises:
            MismatchError: with ``compare``, if names or shapes are not those of the base model's weights.
            UsageError: the name map or the patterns of dtypes do not fit the model.
        """
        if self._config.content is not None or self._name_map is not None or isinstance(self._dtype, Mapping):
            with self.staging():
                models = self.models(LiveDirectory("", {MAIN: self.stem}))
            if compare:
                self.follow(models)

    def follow(self, models: Sequence[LiveModel]) -> None:
        """Fit the config, as ``FittedConfig.follow``: on the rank that writes it, before ``plan``."""
        self._config.follow(models)

    def _plan(
        self,
        output: Path,
        models: Sequence[ModelPlan],
        origin: Origin,
        settings: ModelSettings,
        facts: Mapping[str, str] | None = None,
    ) -> DirectoryPlan:
        texts = {**self._modules.settings(), **(facts or {})}
        return DirectoryPlan(
            output=output,
            models=tuple(models),
            origin=origin,
            config=self._config.content,
            base=self._files.base,
            copies=self._config.copies,
            companions=partial(self._write_companions, texts=texts, settings=settings),
            measure=self._config.measure,
            template=self._config.template.specs,
            allow=self._config.transient,
        )

    def _write_companions(self, directory: Path, texts: Mapping[str, str], settings: ModelSettings) -> None:
        for name, text in texts.items():
            with writing(directory / name, "writing an extra file"):
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                (directory / name).write_text(text, encoding="utf-8")
        self._files.write(self._inner, settings, directory)
        if self._view is not None:
            self._view.write(directory)

    def _live_model(
        self,
        name: str,
        stem: str,
        main: Mapping[str, Tensor],
        average: Mapping[str, Tensor] | None,
        aliases: Mapping[str, str],
    ) -> LiveModel:
        """``average``: None for the main weights."""
        tensors, filled, aliases = self._named(name, main, average, aliases)
        specs = {fqn: TensorSpec(fqn, tuple(tensor.shape), tensor.dtype) for fqn, tensor in tensors.items()}
        if self._stages is not None:
            specs, filled, aliases = self._stages.whole(is_average=average is not None)
        translation = self._translation(specs)
        if translation is not None:
            aliases = translation.translate_aliases(aliases, specs)
            filled = translation.names_of(filled)
            specs = translation.translate(specs)
        return LiveModel(self._plan_model(name, stem, specs, aliases, filled), tensors, translation)

    def _named(
        self, name: str, main: Mapping[str, Tensor], average: Mapping[str, Tensor] | None, aliases: Mapping[str, str]
    ) -> tuple[dict[str, Tensor], frozenset[str], Mapping[str, str]]:
        """The tensors that are written, as the view names them, those that the average lacks, and the ties."""
        chosen = average or {}
        unsaved = self._unsaved - self._config.template.specs.keys()
        written = {fqn: tensor for fqn, tensor in main.items() if fqn not in aliases and fqn not in unsaved}
        tensors = {fqn: chosen.get(fqn, tensor) for fqn, tensor in written.items()}
        filled = frozenset(tensors.keys() - chosen.keys()) if average is not None else frozenset()
        if self._view is None:
            return self._with_own_places(tensors, filled, aliases)
        names, values = self._view.names(main), self._view.values(name)
        filled = frozenset(names[fqn] for fqn in filled - values.keys() if fqn in names)
        tensors = {names[fqn]: values.get(fqn, tensor) for fqn, tensor in tensors.items() if fqn in names}
        copies = self._view.copies()
        tensors |= {copy: tensors[name] for copy, name in copies.items() if name in tensors}
        filled |= {copy for copy, name in copies.items() if name in filled}
        aliases = {names[alias]: names[kept] for alias, kept in aliases.items() if alias in names}
        return self._with_own_places(tensors, filled, aliases)

    def _with_own_places(
        self, tensors: dict[str, Tensor], filled: frozenset[str], aliases: Mapping[str, str]
    ) -> tuple[dict[str, Tensor], frozenset[str], Mapping[str, str]]:
        """The same with what is tied in memory and not in the class under each of its names."""
        apart = self._config.own_places({alias: kept for alias, kept in aliases.items() if kept in tensors})
        tensors = tensors | {alias: tensors[kept] for alias, kept in apart.items()}
        filled = filled | {alias for alias, kept in apart.items() if kept in filled}
        return tensors, filled, {alias: kept for alias, kept in aliases.items() if alias not in apart}

    def _plan_model(
        self, name: str, stem: str, specs: Mapping[str, TensorSpec], aliases: Mapping[str, str], filled: frozenset[str]
    ) -> ModelPlan:
        return plan_model(
            name,
            list(specs.values()),
            stem=stem,
            dtype=self._dtype,
            max_shard_size=self._max_shard_size,
            aliases=aliases,
            filled=filled,
            model_class=self._config.model_class,
        )

    def _translation(self, specs: Mapping[str, TensorSpec]) -> Translation | None:
        """From the model's names to those of the files. Worked out once: main and average have the same."""
        if self._name_map is None:
            return None
        shapes = {name: spec.shape for name, spec in specs.items()}
        if self._translated is None or self._translated[0] != shapes:
            self._translated = shapes, Translation(self._name_map, specs)
            if left_out := self._translated[1].left_out:
                name, reason = next(iter(left_out.items()))
                log.warning("%s tensors are in no export, %s for one: %s", len(left_out), name, reason)
        return self._translated[1]

    def _find_name_map(self) -> NameMap | None:
        """The map that was asked for; None for the identity."""
        if self._names == "identity":
            return None
        if self._names == "auto":
            return None if self._inner is None else TransformersNames.of_model(self._inner, self._config.template.specs)
        return find_name_map(self._names, self._config.content) if isinstance(self._names, str) else self._names
