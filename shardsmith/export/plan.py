"""Work out what ``to-hf`` makes of a checkpoint before a byte is written, and refuse what cannot be done."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from shardsmith.errors import CheckpointNotFoundError, MismatchError, UnsupportedFormatError, UsageError
from shardsmith.export.adapters import is_peft, open_merged
from shardsmith.export.base_comparison import fit, measure_of
from shardsmith.export.module_plan import ModulePlans
from shardsmith.formats.by_path import KnownCheckpoint, known_checkpoint, open_source
from shardsmith.formats.matched import matched_source, names_of_the_run, renamed
from shardsmith.formats.models import ModelSource, TranslatedModel
from shardsmith.ground import layout
from shardsmith.ground.commit import refuse_existing
from shardsmith.hf.base_files import BaseFiles, choose_files, files_of
from shardsmith.hf.base_layout import in_base_layout, orders_of_patches
from shardsmith.hf.config_fit import ConfigFit
from shardsmith.hf.directory import DirectoryPlan, ModelPlan, Origin, plan_model
from shardsmith.hf.hf_directory import is_component, main_stem, protect, read_config
from shardsmith.hf.known_class import model_class_of
from shardsmith.hf.layout_rules import DECLARED, LayoutRule, LayoutRules
from shardsmith.hf.model_class import ModelClass
from shardsmith.hf.model_code import refuse_missing_code
from shardsmith.hf.template import BaseTemplate, read_template
from shardsmith.hf.ties import broken_ties, find_ties, own_places
from shardsmith.hf.vocabulary import say_of_tokenizer, vocabulary_sizes
from shardsmith.manifest.model_settings import GENERATION_FILE, settings_of_step, write_generation
from shardsmith.name_maps.class_names import ClassNames
from shardsmith.name_maps.foreign import advice_for_names, are_foreign
from shardsmith.name_maps.maps import NameMap, find_name_map
from shardsmith.name_maps.matching import match_names
from shardsmith.tensors.checkpoint_keys import EMA, MAIN
from shardsmith.tensors.dtypes import DtypeChoice
from shardsmith.tensors.tensors import TensorSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions:
    """How to write a Hugging Face directory."""

    dtype: DtypeChoice = torch.bfloat16
    """Of floating-point tensors, but of those that the model's class keeps in float32; None: as in the checkpoint."""
    max_shard_size: str | None = None
    """Such as "5GB": more than one file if the weights are larger. None: one file."""
    trust_remote_code: bool = False
    """Copy all Python files of the base model, not only those that its configs name. They are never run."""
    allow: tuple[str, ...] = ()
    """Patterns of tensor names that may differ from the base model's weights."""
    drop: tuple[str, ...] = ()
    """Patterns of tensors of the checkpoint to leave out, such as those of a head that was trained beside the model."""
    verify: bool = True
    """Compare the checkpoint's files with their recorded hashes, and what was written with what was to be written."""
    rules: tuple[LayoutRule, ...] = DECLARED
    """What is done to tensors whose layout is not the base model's."""
    average: str | None = None
    """Which one, where the checkpoint has several; None takes the first."""
    adapters: Literal["adapter", "merged"] = "adapter"
    """Of a peft model: the adapter alone, as peft saves it, or the whole model with the adapter merged."""
    names: str = "auto"
    """Name map: "identity", "transformers", one that a package offers, or "auto": transformers where it is needed."""


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """A directory, and the checkpoint that it is made from."""

    directory: DirectoryPlan
    known: KnownCheckpoint
    base: Path
    sources: Mapping[str, ModelSource | TranslatedModel]
    """By model."""
    verify: bool
    template: BaseTemplate
    rules: Mapping[str, str] = field(default_factory=dict)
    """Name of a tensor -> the layout rule that was used on it."""
    orders: Mapping[str, str] = field(default_factory=dict)
    """Name of a patch embedding -> whether its values are in the base model's order."""
    allow: tuple[str, ...] = ()
    """Patterns of names that may differ from the template."""
    dropped: tuple[str, ...] = ()
    """Tensors of the checkpoint that were left out."""
    old_weights: Mapping[str, str] = field(default_factory=dict)
    """Files of the base model that are copied although what they hold belongs to the checkpoint's model -> why."""
    modules: Mapping[str, Mapping[str, TensorSpec]] = field(default_factory=dict)
    """Of modules beside the model, as the directory calls them, the tensors of the base model's files."""
    fitted: ConfigFit | None = None
    """What was adapted in the config, and what its class says of the tensors."""
    files: BaseFiles | None = None
    """What of the base model is copied, and what is not."""
    generates_otherwise: bool = False
    """Whether ``generation_config.json`` is that of the model that trained, and not the base model's."""

    @property
    def checkpoint(self) -> Path:
        """Path of the checkpoint."""
        return self.known.path

    def close(self) -> None:
        """Let go of the checkpoint's files, which take up space as long as they are open, even when deleted."""
        for source in self.sources.values():
            source.close()


def plan_directory(
    checkpoint: Path | KnownCheckpoint, output: Path, base: Path, stems: Mapping[str, str], options: ExportOptions
) -> ExportPlan:
    """Work out a directory and refuse what cannot be done. Writes nothing.

    Args:
        checkpoint: The checkpoint's directory or file, or one whose format is known.
        output: The directory to make.
        base: The base model's directory.
        stems: Model name ("main", "ema") -> stem of its weight files.
        options: How to write it.

    Raises:
        ProtectedPathError, TargetExistsError: the output is no place to write to.
        CheckpointError: the checkpoint or the base cannot be used, or the weights do not fit the base's.
    """
    protect(output, checkpoint.path if isinstance(checkpoint, KnownCheckpoint) else checkpoint, base)
    refuse_existing(output)
    known, config, template = known_checkpoint(checkpoint), read_config(base), read_template(base)
    specs = template.specs
    # What the model said of itself when the step was saved goes before what the base says.
    settings = settings_of_step(known.path) if known.is_ours else None
    live = None if settings is None else settings.config
    layouts = LayoutRules(specs, options.rules)
    sources: dict[str, ModelSource | TranslatedModel] = {}
    models = []
    fitted: ConfigFit | None = None
    model_class, _ = model_class_of(config)
    live_class = model_class if live is None else model_class_of(live)[0] or model_class
    sizes = vocabulary_sizes(config)
    name_map: NameMap | None = None
    dropped: dict[str, None] = {}
    modules = ModulePlans(base, dtype=options.dtype, allow=options.allow, drop=options.drop)
    for model, stem in stems.items():
        opened, gone = _open_model(known, model, base, specs, model_class, sizes, options)
        own = opened.specs
        named = like(opened, options.drop)  # before names are matched: what stays may fit in one way only then
        opened, of_modules = modules.take(opened.without(named), model, stem, named)
        recorded = names_of_the_run(opened, specs, lambda: known.manifest) if options.names == "auto" else None
        chosen = options if recorded is None else replace(options, names="identity")  # until the map is applied
        opened = opened.untied(own_places(opened.aliases, live_class, specs))
        placed = under_base_names(opened, specs, base, chosen.names)
        placed = placed.untied(own_places(placed.aliases, live_class, specs))  # as now named, in whatever module
        unwanted = like(placed, options.drop)
        left_out = [*gone, *named, *of_modules, *unwanted]
        _refuse_idle(known.path, options.drop, left_out)
        dropped |= dict.fromkeys(left_out)
        opened = placed.without([*unwanted, *_unsaved(placed, model_class, specs)])
        source = sources[model] = in_base_layout(opened, layouts)
        as_stored = _plan_model(source, model, stem, model_class, specs, base, replace(chosen, dtype=None), None, sizes)
        name_map = recorded or name_map or _choose_name_map(as_stored, base, config, specs, options)
        if name_map is not None:
            source = sources[model] = in_base_layout(TranslatedModel(opened, name_map), layouts)
        plan = _plan_model(source, model, stem, model_class, specs, base, chosen, name_map, sizes)
        separate = {} if model_class is None else _separate(source, plan, model_class)
        fitted = fitted or fit(source.path, plan, config, template, separate, options.allow, live, own)
        models.append(plan)
    assert fitted is not None
    tensors = {**{spec.name: spec for plan in models for spec in plan.specs}, **opened.specs}
    files = choose_files(base, tensors, trust_remote_code=options.trust_remote_code)
    refuse_missing_code(output, fitted, files.copies)
    copies = [name for name in files.copies if not modules.are_written(name)]
    sources |= modules.sources
    generation = None if settings is None else settings.generation_beside(base)
    directory = DirectoryPlan(
        output,
        (*models, *modules.plans),
        origin_of(known),
        fitted.config,
        base,
        tuple(name for name in copies if generation is None or name != GENERATION_FILE),
        None if generation is None else partial(write_generation, generation),
        measure=replace(measure_of(fitted, template), tokenizer=say_of_tokenizer(base, tensors, config, fitted.config)),
        template=specs,
        allow=options.allow,
    )
    return ExportPlan(
        directory,
        known,
        base,
        sources,
        options.verify,
        template,
        {name: rule.name for name, rule in layouts.used.items()},
        orders_of_patches(sources, template, options.rules, options.allow),
        options.allow,
        tuple(dropped),
        _old_weights(base, [name for name in files.weights if name in copies], dropped, modules),
        modules.specs,
        fitted,
        files,
        generation is not None,
    )


def _old_weights(base: Path, weights: Sequence[str], dropped: Collection[str], modules: ModulePlans) -> dict[str, str]:
    """As ``ExportPlan.old_weights``, of these files of the base model."""
    left_out = files_of(base, weights, dropped) if dropped else []
    return {
        **dict.fromkeys(left_out, "what the checkpoint has of it was left out"),
        **dict.fromkeys(filter(modules.lack, weights), "the checkpoint has nothing of it, as was allowed"),
    }


def _open_model(
    known: KnownCheckpoint,
    model: str,
    base: Path,
    specs: Mapping[str, TensorSpec],
    model_class: ModelClass | None,
    vocabulary: Collection[int],
    options: ExportOptions,
) -> tuple[ModelSource, Sequence[str]]:
    """Open a model, without heads, tied names and what its class does not save; and the names of heads and adapters.

    Raises CheckpointError.
    """
    which = f"{model}:{options.average}" if options.average and model == EMA else model
    opened = known.open(which)
    _refuse_strays(opened, model)
    gone = like(opened, options.drop) if is_peft(opened) else []  # of several adapters one may be left then
    opened = open_merged(opened.without(gone), known.path, base)
    heads = recorded_heads(known, opened, specs)
    opened = opened.without(heads)
    if model_class is not None:  # the names in memory, before any map has changed them
        opened = opened.without(_unsaved(opened, model_class, specs))
        if not opened.aliases:
            opened = opened.tied(_ties(opened, model_class, specs, known.open, vocabulary))
    return opened, [*gone, *heads]


def _unsaved(source: ModelSource, model_class: ModelClass | None, base: Collection[str]) -> list[str]:
    """What the class computes itself, and its files do not have."""
    names = () if model_class is None else model_class.unsaved
    return [name for name in names if name in source.specs and name not in base]


def _refuse_strays(source: ModelSource, model: str) -> None:
    """Raise MismatchError for an average that has names of its own and lacks some of the model's.

    What it lacks would be filled up from main, and nobody could tell.
    """
    if model == EMA and source.left_out and source.filled:
        lines = [f"{key}: {reason}" for key, reason in source.left_out.items()]
        lines += [f"{name}: in the model, not in the average" for name in sorted(source.filled)]
        summary = "the average does not have the names of the model"
        raise MismatchError(source.path, summary, lines, "Nothing was written. To export main alone: --models main.")


def under_base_names(
    source: ModelSource, template: Mapping[str, TensorSpec], base: Path, names: str = "auto"
) -> ModelSource:
    """Return a model without what wrappers and generations of transformers have put into its names.

    Args:
        source: The model under the checkpoint's names.
        template: The base's own tensors: the model's come under their names, and cut up as they are. Where it has none,
            they keep their own names, without wrappers and prefix, as the class of its config shows these to be.
        base: The base model's directory.
        names: As the options have it; only ``"auto"`` changes names.
    """
    if names != "auto":
        return source
    classes = ClassNames.of_directory(base)
    if template:
        return matched_source(source, template, classes)[0]
    target = classes.specs
    # Without ``architectures`` any head may be meant, and the names of one class say nothing about those of another.
    if not target and is_component(config := read_config(base)) and (model_class := model_class_of(config)[0]):
        target = {name: spec for name, spec in model_class.specs.items() if name not in model_class.tied}
    found = match_names(source.specs, target, classes, source.aliases)
    return renamed(source, replace(found, keys=found.stripped))


def like(source: ModelSource, patterns: Sequence[str]) -> list[str]:
    """Return tensors and aliases whose names are like one of the patterns."""
    return [name for name in (*source.specs, *source.aliases) if any(fnmatchcase(name, one) for one in patterns)]


def _refuse_idle(path: Path, patterns: Sequence[str], dropped: Sequence[str]) -> None:
    """Raise UsageError if a pattern fits nothing. Then something is not as was thought."""
    if idle := [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in dropped)]:
        raise UsageError(f"drop: {', '.join(map(repr, idle))} fits no tensor of {path}. Correct it, or leave it out")


def recorded_heads(checkpoint: KnownCheckpoint, source: ModelSource, base: Collection[str]) -> list[str]:
    """Return the tensors of heads that to-dcp recorded as trained beside the model; the base has no place for them."""
    manifest = checkpoint.manifest if checkpoint.is_ours else None
    record = None if manifest is None else manifest.initial
    recorded = {key for keys in record.heads.values() for key in keys} if record is not None else set()
    return [name for name in source.specs if name in recorded and name not in base]


def choose_stems(
    checkpoint: Path | KnownCheckpoint,
    base: Path,
    models: Literal["main", "ema", "both", "all"],
    ema_as: Literal["auto", "file", "directory"],
    average: str | None = None,
) -> list[tuple[str, dict[str, str]]]:
    """Return which directories to make: suffix of the output's name and, per model in it, the stem of its files.

    An average beside the main weights is ``ema.safetensors``. Alone it is the directory's own weights, which
    ``from_pretrained`` loads, unless the base model itself keeps its weights in ``ema.safetensors``.

    Args:
        checkpoint: The checkpoint.
        base: The base model's directory.
        models: Which models to write.
        ema_as: Where the average goes.
        average: A dict of the checkpoint that is to count as the average, whatever it is called.

    Raises:
        CheckpointNotFoundError: the checkpoint does not hold what was asked for.
    """
    known = known_checkpoint(checkpoint)
    present = known.models()
    if average is not None and models != MAIN:
        known.open(f"{EMA}:{average}").close()  # or it says which averages there are
        present = list(dict.fromkeys([*present, EMA]))
    wanted = {"both": [MAIN, EMA], "all": present or [MAIN]}.get(models, [models])
    if missing := [model for model in wanted if model not in present]:
        kind = known.format
        here = f"it holds only {present[0]}: --models {present[0]}" if present else f"it is {kind.name}: {kind.reason}"
        raise CheckpointNotFoundError(known.path, f"has no {' and no '.join(missing)} weights; {here}")
    both, main = len(wanted) == 2, main_stem(read_config(base))
    if both and ema_as == "directory":
        return [("", {MAIN: main}), ("-ema", {EMA: main})]
    as_file = ema_as == "file" or both
    if not both and ema_as == "auto":
        as_file = (base / f"{layout.EMA_WEIGHTS}.safetensors").is_file()
    stems = {MAIN: main, EMA: layout.EMA_WEIGHTS if as_file else main}
    return [("", {model: stems[model] for model in wanted})]


def _plan_model(
    source: ModelSource | TranslatedModel,
    model: str,
    stem: str,
    model_class: ModelClass | None,
    template: Mapping[str, TensorSpec],
    base: Path,
    options: ExportOptions,
    name_map: NameMap | None = None,
    vocabulary: Collection[int] = (),
) -> ModelPlan:
    def main() -> ModelSource | TranslatedModel:
        opened = under_base_names(open_source(source.path, MAIN), template, base, options.names)
        return opened if name_map is None else TranslatedModel(opened, name_map)

    return plan_model(
        model,
        list(source.specs.values()),
        stem=stem,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
        aliases=source.aliases or _ties(source, model_class, template, main, vocabulary),
        filled=source.filled,
        model_class=model_class,
    )


def _ties(
    source: ModelSource | TranslatedModel,
    model_class: ModelClass | None,
    template: Mapping[str, TensorSpec],
    open_main: Callable[[], ModelSource | TranslatedModel],
    vocabulary: Collection[int],
) -> dict[str, str]:
    """As ``find_ties``. What an average took from main is compared there: here its twin has moved on."""
    if not source.filled:
        return find_ties(source, template, model_class, vocabulary)
    with contextlib.closing(open_main()) as main:
        return find_ties(main, template, model_class, vocabulary)


def _separate(source: ModelSource | TranslatedModel, plan: ModelPlan, model_class: ModelClass) -> dict[str, str]:
    """What is to be written under both names although the class ties them, for the values differ."""
    written = {spec.name for spec in plan.specs}
    broken = broken_ties(source, model_class)
    return {alias: kept for alias, kept in broken.items() if {alias, kept} <= written}


def _choose_name_map(
    plan: ModelPlan, base: Path, config: dict[str, Any], template: Mapping[str, TensorSpec], options: ExportOptions
) -> NameMap | None:
    """The map that the options ask for; None for the identity. transformers, which takes seconds, only if needed.

    Where the base has no weights to compare with, experts that are fused into one tensor are what needs it.
    """
    if options.names == "identity":
        return None
    if options.names not in ("auto", "transformers"):
        return find_name_map(options.names, config)
    if options.names == "auto":
        _refuse_foreign_names(plan, template)
        names = {spec.name for spec in plan.specs}
        fused = any(len(spec.shape) > 2 and "experts" in spec.name for spec in plan.specs)
        # Only where both sides have names without a partner can other names bring them together. Another shape is for
        # ``under_base_names``, which knows the names in memory.
        if not (names - template.keys() and template.keys() - names if template else fused):
            return None
    from shardsmith.name_maps.transformers import TransformersNames

    try:
        return TransformersNames.of_directory(base, template)
    except UnsupportedFormatError:
        if options.names == "auto":
            return None
        raise


def _refuse_foreign_names(plan: ModelPlan, template: Mapping[str, TensorSpec]) -> None:
    """Raise UsageError for names that no Hugging Face model has, unless the base model has them."""
    unknown = {spec.name for spec in plan.specs} - template.keys()
    if are_foreign(unknown) and (advice := advice_for_names(unknown)):
        raise UsageError(advice)


def origin_of(checkpoint: KnownCheckpoint) -> Origin:
    """Return what ``shardsmith.json`` records of where the weights come from."""
    name, manifest = checkpoint.path.resolve().name, checkpoint.manifest
    return Origin(name) if manifest is None else Origin(name, manifest.attempt, manifest.step, manifest.ema)
