"""What a run's Hugging Face directories hold: live weights under the names of the files, and everything beside them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shardsmith.errors import MismatchError
from shardsmith.export.base_comparison import advice_of_hooks, fit, measure_of
from shardsmith.export.live import LiveModel
from shardsmith.export.plan import origin_of
from shardsmith.formats.by_path import known_checkpoint
from shardsmith.formats.matched import renamed
from shardsmith.formats.models import ModelSource, TranslatedModel
from shardsmith.ground.commit import writing
from shardsmith.ground.ranks import Ranks
from shardsmith.ground.sizes import parse_size
from shardsmith.hf.base_files import choose_files
from shardsmith.hf.directory import DirectoryPlan, Measure, ModelPlan, Origin, plan_model
from shardsmith.hf.hf_directory import main_stem, read_config
from shardsmith.hf.known_class import model_class_of
from shardsmith.hf.live_config import full_config, saved_config, settings_of
from shardsmith.hf.model_code import refuse_missing_code
from shardsmith.hf.modules import Modules
from shardsmith.hf.template import BaseTemplate, read_template
from shardsmith.hf.ties import broken_ties, tied_groups
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
    non_persistent_buffers,
    own_class,
    refuse_without_values,
    tied_weights,
    unwrapped,
)
from shardsmith.tensors.tensors import Shape, TensorSpec

from .adapters import HeldAdapter
from .ema import EMA
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
        self._own_config: dict[str, Any] | None = None  # before it is adapted to tensors
        self._config: dict[str, Any] | None = None
        self._described: Any = None  # what the config was last fitted to
        self._said: set[str] = set()
        self._template, self._measure = BaseTemplate(Path(), None, {}, ""), Measure()
        self._copies: tuple[str, ...] = ()
        self._names = names
        self._view = view
        self._inner = unwrapped(model) if view is None else view.inner
        # a base model of an older transformers has some of them in its files: position_ids, for one
        self._transient = () if self._inner is None else tuple(non_persistent_buffers(self._inner))
        # what the class computes, and save_pretrained leaves out: sinusoidal positions, for one
        self._unsaved = frozenset(getattr(self._inner, "_keys_to_ignore_on_save", None) or ())
        self._name_map: NameMap | None = None
        self._translated: tuple[dict[str, Shape], Translation] | None = None
        self._stages: Stages | None = None
        self._known: dict[str, KnownPlan] = {}  # by suffix of the directory

    def read_files(self) -> None:
        """Read what lies beside the weights. First of all, on every rank; no communication. Raises CheckpointError."""
        base = self._files.base
        self._config = self._own_config = saved_config(self._inner) if base is None else read_config(base)
        if base is not None:
            self._template = read_template(base)
            own = {clean_fqn(name, self._model): p for name, p in self._model.named_parameters()}
            if self._view is not None:
                own |= {new: own[fqn] for fqn, new in self._view.names(own).items()}
            specs = {name: TensorSpec(name, tuple(p.shape), p.dtype) for name, p in own.items()}
            files = choose_files(
                base, {**specs, **self._template.specs}, trust_remote_code=self._files.trust_remote_code
            )
            self._copies = tuple(name for name in files.copies if not self._files.replaced(name))
            files.log_what_is_unexpected(log)
        self._name_map = self._find_name_map()

    @property
    def stem(self) -> str:
        """What the files of the main weights are called. After ``read_files``."""
        return main_stem(self._config)

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
                    self._fit(checkpoint, model, settings.config, sources[model.model])
            origin = origin_of(known)
            if AVERAGE not in directory.stems:
                origin = replace(origin, ema=None)
            opened.pop_all()
        return self._plan(output, models, origin, settings), sources

    def _known_names(self, source: ModelSource) -> ModelSource:
        """The tensors of a checkpoint of the run, under the names of the model that the module holds."""
        if self._view is None:
            return source
        names, aliases = self._view.names(source.specs), self._view.names(source.aliases)
        found = Alignment({new: own for own, new in names.items()}, {new: own for own, new in aliases.items()})
        return renamed(source, found)

    def check(self, *, compare: bool) -> None:
        """Plan an export, if anything could speak against it. All ranks; communicates as ``models`` does.

        Raises:
            MismatchError: with ``compare``, if names or shapes are not those of the base model's weights.
            UsageError: the name map or the patterns of dtypes do not fit the model.
        """
        if self._config is not None or self._name_map is not None or isinstance(self._dtype, Mapping):
            with self.staging():
                models = self.models(LiveDirectory("", {MAIN: self.stem}))
            if compare:
                self.follow(models)

    def follow(self, models: Sequence[LiveModel]) -> None:
        """Fit the config again if tensors, ties or the live model's config are not as they were. No communication.

        On the rank that writes the config, before ``plan``.

        Raises:
            MismatchError: names or shapes are no longer those of the base model's weights, and no config has them.
        """
        plan = models[0].plan
        # Without dtypes: an average may have others than the main weights, under the same names.
        shapes = [(spec.name, spec.shape) for spec in plan.specs]
        config = full_config(self._inner)
        now = shapes, dict(plan.aliases), config
        if now != self._described:
            if self._files.base is None:
                self._own_config = saved_config(self._inner)
            self._compare(plan, config)
            self._described = now
            if plan.float32_unknown:
                log.warning("%s", plan.float32_unknown)

    def _plan(
        self,
        output: Path,
        models: Sequence[ModelPlan],
        origin: Origin,
        settings: ModelSettings,
        facts: Mapping[str, str] | None = None,
    ) -> DirectoryPlan:
        return DirectoryPlan(
            output=output,
            models=tuple(models),
            origin=origin,
            config=self._config,
            base=self._files.base,
            copies=self._copies,
            companions=partial(self._write_companions, facts=dict(facts or {}), settings=settings),
            measure=self._measure,
            template=self._template.specs,
            allow=self._transient,
        )

    def _compare(self, plan: ModelPlan, live: Mapping[str, Any]) -> None:
        """As ``_fit``, of the live weights; what is wrong is said of the model that trains."""
        place = self._files.base or Path(own_class(self._inner or self._model).__name__)
        try:
            self._fit(place, plan, live, None)
        except MismatchError as error:
            summary = f"{len(error.problems)} tensors of the model that trains are not as in the base model"
            advice = self._advice_of_modules(plan) or advice_of_hooks(error, "STEP")
            raise MismatchError(place, summary, error.problems, advice) from None

    def _advice_of_modules(self, plan: ModelPlan) -> str:
        """What to do about a model of sentence-transformers whose modules have weights; empty for any other model."""
        base = self._files.base
        held = Modules(base).divide([spec.name for spec in plan.specs]) if base is not None else []
        if not held:
            return ""
        return (
            f"Nothing was written. The model has weights of {', '.join(module.folder for module, _ in held)}, which "
            "HFExport does not write. Leave it out and export saved steps, with all modules:\n"
            f"shardsmith to-hf --checkpoint STEP --base-model {base} --output-dir DIRECTORY"
        )

    def _fit(
        self, path: Path, plan: ModelPlan, live: Mapping[str, Any], source: ModelSource | TranslatedModel | None
    ) -> None:
        """Adapt the config to the tensors, and compare them with the base model and with the class that it names.

        Args:
            path: Where the tensors are from, for the errors.
            plan: The planned tensors of one model.
            live: What the config of the live model says, with every default.
            source: Of the tensors, where they are in a checkpoint; None for live weights, where what is tied is one
                tensor in memory.

        Raises:
            MismatchError: as ``fit``.
        """
        if (config := self._own_config) is None:
            return
        model_class, separate = model_class_of(config)[0], dict[str, str]()
        if model_class is not None:
            names = {spec.name for spec in plan.specs}
            groups = tied_groups(model_class.tied, names)
            separate = {alias: kept for kept, *aliases in groups for alias in aliases}
            if source is not None and separate:
                separate = {a: k for a, k in broken_ties(source, model_class).items() if {a, k} <= names}
        found = fit(path, plan, config, self._template, separate, self._transient, live)
        refuse_missing_code(path, found, {*self._copies, *self._files.extra, *self._files.code(self._inner)})
        self._config, self._measure = found.config, measure_of(found, self._template)
        for change in [change for change in found.changes if change not in self._said]:
            self._said.add(change)
            is_open = "tokenizer" in change and self._files.processor is None
            log.log(logging.WARNING if is_open else logging.INFO, "config.json is adapted: %s", change)

    def _write_companions(self, directory: Path, facts: Mapping[str, str], settings: ModelSettings) -> None:
        for name, text in facts.items():
            with writing(directory / name, "writing an extra file"):
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
        unsaved = self._unsaved - self._template.specs.keys()
        written = {fqn: tensor for fqn, tensor in main.items() if fqn not in aliases and fqn not in unsaved}
        tensors = {fqn: chosen.get(fqn, tensor) for fqn, tensor in written.items()}
        filled = frozenset(tensors.keys() - chosen.keys()) if average is not None else frozenset()
        if self._view is None:
            return tensors, filled, aliases
        names, values = self._view.names(main), self._view.values(name)
        filled = frozenset(names[fqn] for fqn in filled - values.keys() if fqn in names)
        tensors = {names[fqn]: values.get(fqn, tensor) for fqn, tensor in tensors.items() if fqn in names}
        copies = self._view.copies()
        tensors |= {copy: tensors[name] for copy, name in copies.items() if name in tensors}
        filled |= {copy for copy, name in copies.items() if name in filled}
        return tensors, filled, {names[alias]: names[kept] for alias, kept in aliases.items() if alias in names}

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
            model_class=None if self._own_config is None else model_class_of(self._own_config)[0],
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
            return None if self._inner is None else TransformersNames.of_model(self._inner, self._template.specs)
        return find_name_map(self._names, self._config) if isinstance(self._names, str) else self._names
