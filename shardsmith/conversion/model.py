"""A model directory as the model that trains sees it: its state dict out of the files, and all that is to be known."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor

from shardsmith.errors import CorruptCheckpointError, MismatchError, UnsupportedFormatError, UsageError
from shardsmith.formats.by_path import open_source
from shardsmith.formats.models import ModelSource
from shardsmith.hf.blueprint import Blueprint, describe, model_of_directory
from shardsmith.hf.hf_directory import CONFIG_FILE, read_config
from shardsmith.name_maps.maps import NameMap, find_name_map
from shardsmith.name_maps.restored import RestoredModel
from shardsmith.sharding.source_digests import digest_source
from shardsmith.tensors.tensors import TensorSource, TensorSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionModel:
    """What a checkpoint is made of."""

    source: TensorSource
    """The tensors, under the names that the model gives them; of tied ones the kept name only."""
    stored: Mapping[str, str]
    """Name of each tensor to be written -> its name in the source."""
    specs: Mapping[str, TensorSpec]
    """Of those, in the model's order, with the dtypes of the source."""
    tied: Mapping[str, str]
    """Alias -> kept name."""
    blueprint: Blueprint | None
    """None where nothing knows the model."""
    names: str
    """How the names of the files became these."""
    ignored: tuple[str, ...]
    """Tensors of the files that the model does without."""
    files: Mapping[str, str] | None = None
    """Name of each tensor to be written -> its name in the files, where each is there as it is; else None."""
    note: str = ""
    """What a user should know."""


@runtime_checkable
class KnowsModel(NameMap, Protocol):
    """A name map of one model, which is not that of the directory's config."""

    @property
    def blueprint(self) -> Blueprint:
        """What its state dict holds."""
        ...

    def make(self, names: Iterable[str]) -> Mapping[str, Tensor]:
        """Values that buffers begin with, for those of the state dict that no files have."""
        ...


def open_conversion_model(
    directory: Path, *, names: str | None = None, trust_remote_code: bool = False
) -> ConversionModel:
    """Open a model directory, or a file of weights, and compare its tensors with those of the model.

    Args:
        directory: The model's directory, or its file of weights.
        names: Name map of a model that is not that of the directory's config, and knows its own.
        trust_remote_code: Let transformers run the directory's own Python files.

    Raises:
        UsageError: there is no such map, or it does not know its model.
        CheckpointError: it cannot be read; MismatchError if tensors are missing, of other shapes, or of no use.
    """
    files = open_source(directory)
    if names is not None:
        name_map = find_name_map(names, read_config(directory) if (directory / CONFIG_FILE).is_file() else None)
        if not isinstance(name_map, KnowsModel):
            raise UsageError(f"the name map {names} does not know which tensors a model needs")
        return _restored(files, name_map.blueprint, name_map, names)
    try:
        model = model_of_directory(directory, trust_remote_code=trust_remote_code)
    except UnsupportedFormatError as error:
        return _unknown(files, str(error))
    blueprint = describe(model)
    # Files that were saved from the inner model lack the prefix that the names of the whole model begin with.
    as_saved, files = files, _prefixed(files, blueprint, getattr(model, "base_model_prefix", ""))
    missing = _differences(files.specs, blueprint)
    if not missing:
        return _identity(files, blueprint, {} if files is as_saved else files.keys)
    # The names in memory are not those of the files: the class's own renames may say how the one becomes the other.
    converted = _transformers_names(directory, files)
    if converted is None:
        raise _mismatch(directory, missing)
    try:
        return _restored(files, blueprint, converted, "transformers")
    except MismatchError as error:
        # Report the shorter list: where the renames explain less than plain names do, they are not the cause.
        if len(error.problems) < len(missing):
            raise
        raise _mismatch(directory, missing) from None


def _prefixed(files: ModelSource, blueprint: Blueprint, prefix: str) -> ModelSource:
    """The files under the names of the whole model, where they were saved from its inner one."""
    wanted = blueprint.state_dict
    names = {f"{prefix}.{n}" if n not in wanted and f"{prefix}.{n}" in wanted else n: n for n in files.specs}
    # Two names would become one: then the prefix is not what the names differ by.
    if all(new == old for new, old in names.items()) or len(names) < len(files.specs):
        return files
    return ModelSource(files, names, filled=frozenset(), aliases={})


def _identity(files: ModelSource, blueprint: Blueprint, saved: Mapping[str, str]) -> ConversionModel:
    """Every tensor of the model is in the files under its own name, or under that of a tie.

    Args:
        files: The tensors in the files.
        blueprint: The model that the config describes.
        saved: Name that it was saved by, where that is another.
    """
    stored, tied = {}, {}
    for name in blueprint.state_dict:
        kept = blueprint.tied.get(name)
        if kept is None:
            # Of tied names the files may have an alias only; then the kept name is read from that.
            stored[name] = next(n for n in [name, *_aliases(name, blueprint.tied)] if n in files.specs)
        else:
            tied[name] = kept
    _refuse_unequal_ties(files, tied, stored)
    unused = tuple(name for name in files.specs if name not in stored.values() and name not in tied)
    specs = {name: _renamed(files.specs[other], name) for name, other in stored.items()}
    return ConversionModel(
        source=files,
        stored=stored,
        specs=specs,
        tied=tied,
        blueprint=blueprint,
        names="identity",
        ignored=unused,
        files={name: saved.get(other, other) for name, other in stored.items()},
    )


def _restored(files: ModelSource, blueprint: Blueprint, name_map: NameMap, names: str) -> ConversionModel:
    """The model has other names, or other tensors, than the files."""
    wanted = {name: spec for name, spec in blueprint.state_dict.items() if name not in blueprint.tied}
    made = name_map.make(blueprint.buffers) if isinstance(name_map, KnowsModel) else {}
    source = RestoredModel(files, name_map, wanted, blueprint.tied, made)
    _refuse_different(files, source.twice)
    useless = [name for name in source.unused if not _is_ignorable(name, blueprint)]
    if useless:
        raise _mismatch(
            files.path, [f"{name}: in the files {files.specs[name].shape}, not in the model" for name in useless]
        )
    return ConversionModel(
        source=source,
        stored={name: name for name in wanted},
        specs={name: source.specs[name] for name in wanted},
        tied=dict(blueprint.tied),
        blueprint=blueprint,
        names=names,
        ignored=source.unused,
        note=_made_note(source.absent),
    )


def _unknown(files: ModelSource, reason: str) -> ConversionModel:
    """Nothing knows the model: the names are those of the files."""
    tied = dict(files.aliases)
    names = [name for name in files.specs if name not in tied]
    return ConversionModel(
        source=files,
        stored={name: name for name in names},
        specs={name: files.specs[name] for name in names},
        tied=tied,
        blueprint=None,
        names="identity",
        ignored=(),
        files={name: name for name in names},
        note=f"names and counts are those of the files; no model was made to compare them with: {reason}",
    )


def _transformers_names(directory: Path, files: ModelSource) -> NameMap | None:
    from shardsmith.name_maps.transformers import TransformersNames

    try:
        return TransformersNames.of_directory(directory, files.specs)
    except UnsupportedFormatError:
        return None


def _differences(found: Mapping[str, TensorSpec], blueprint: Blueprint) -> list[str]:
    problems = []
    for name, spec in blueprint.state_dict.items():
        # A tied tensor counts as there under any of its names.
        names = [name, blueprint.tied.get(name, name), *_aliases(name, blueprint.tied)]
        stored = next((found[n] for n in names if n in found), None)
        if stored is None:
            problems.append(f"{name}: in the model {spec.shape}, not in the files")
        elif stored.shape != spec.shape:
            problems.append(f"{name}: {stored.shape} in the files, {spec.shape} in the model")
    for name in found:
        if name not in blueprint.state_dict and not _is_ignorable(name, blueprint):
            problems.append(f"{name}: in the files {found[name].shape}, not in the model")
    return problems


def _mismatch(path: Path, problems: list[str]) -> MismatchError:
    advice = "Nothing was written. Files and config.json are not of one model, or the files are not complete."
    if scheme := _quantization(path):
        advice = (
            f"Nothing was written. The model is quantized ({scheme}), and training starts from plain weights: load it "
            "with from_pretrained, call dequantize() and save_pretrained(), and convert that directory."
        )
    return MismatchError(
        path, f"{len(problems)} tensors are not as the model of config.json has them", problems, advice
    )


def _quantization(path: Path) -> str:
    """The method by which a directory's weights are quantised, by its config; empty if they are not."""
    if not (path / CONFIG_FILE).is_file():
        return ""
    config = read_config(path)
    # Of a model of several parts, each part has a config of its own, such as "text_config".
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    schemes = [part["quantization_config"] for part in parts if isinstance(part.get("quantization_config"), dict)]
    return str(schemes[0].get("quant_method", "quantization_config")) if schemes else ""


def _refuse_unequal_ties(files: ModelSource, tied: Mapping[str, str], stored: Mapping[str, str]) -> None:
    """Raise if the files have both names of a tied pair, with different values."""
    _refuse_different(
        files, {alias: stored[kept] for alias, kept in tied.items() if alias in files.specs and stored[kept] != alias}
    )


def _refuse_different(files: ModelSource, twice: Mapping[str, str]) -> None:
    if not twice:
        return
    # By digests: each tensor is streamed once, and neither has to be in memory.
    names = {*twice, *twice.values()}
    digests = digest_source(files, {name: files.specs[name].dtype for name in sorted(names)})
    lines = [f"{alias} and {kept}" for alias, kept in twice.items() if digests[alias] != digests[kept]]
    if lines:
        reason = "the config says that they are one tensor, but the files hold different values for"
        raise CorruptCheckpointError(files.path, "\n  ".join([reason, *lines]) + "\nNothing was written.")


def _made_note(absent: Mapping[str, str]) -> str:
    if not absent:
        return ""
    reason = next(iter(absent.values()))
    return f"{len(absent)} buffers begin as in a new model, {next(iter(absent))} for one: {reason}"


def _aliases(name: str, tied: Mapping[str, str]) -> Iterable[str]:
    return (alias for alias, kept in tied.items() if kept == name)


def _is_ignorable(name: str, blueprint: Blueprint) -> bool:
    """Buffers that the model computes itself, which older versions saved, and what its class says it can do without."""
    return name in blueprint.transient or any(re.search(pattern, name) for pattern in blueprint.ignorable)


def _renamed(spec: TensorSpec, name: str) -> TensorSpec:
    return TensorSpec(name, spec.shape, spec.dtype)
