"""Work out what ``to-dcp`` makes of a model before a byte is written, and refuse what cannot be done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from shardsmith.compare.configs import effective_config
from shardsmith.conversion.heads import Head, find_version, future_predictor, make_head, parse_extra_module
from shardsmith.conversion.model import ConversionModel, open_conversion_model
from shardsmith.conversion.model_directory import find_model, hash_tokenizer
from shardsmith.conversion.write_plan import ConversionOptions, Layout, WritePlan
from shardsmith.errors import UsageError
from shardsmith.formats.by_path import detect_checkpoint_format
from shardsmith.formats.dcp.shard_files import Stream, plan_chunks
from shardsmith.ground.commit import refuse_existing
from shardsmith.hf.hf_directory import CONFIG_FILE, protect, read_config
from shardsmith.hf.known_class import model_class_of
from shardsmith.hf.model_class import Kept
from shardsmith.hf.modules import Modules
from shardsmith.manifest.initial import BufferRecord, InitialRecord, config_hash
from shardsmith.tensors.checkpoint_keys import NOT_A_MODEL
from shardsmith.tensors.dtypes import cast_specs, dtype_name
from shardsmith.tensors.tensors import TensorSpec

_NESTED = "model"


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionPlan(WritePlan):
    """A checkpoint to be made, and all that is known of its model."""

    directory: Path
    """Of the model."""
    model: ConversionModel
    heads: tuple[Head, ...]
    initial: InitialRecord


def plan_conversion(model: str, output: Path, options: ConversionOptions) -> ConversionPlan:
    """Work out a checkpoint and refuse what cannot be done. Writes nothing.

    Args:
        model: A directory, or a name on the Hub.
        output: The directory to make.
        options: How to do it.

    Raises:
        ProtectedPathError, TargetExistsError: the output is no place to write to.
        CheckpointError: the model cannot be used, or its tensors are not those of its config.
        UsageError: a head cannot be made, or has a key that the model has.
    """
    directory = find_model(model)
    protect(output, directory)
    # Before the model is opened, which may import transformers and take seconds.
    refuse_existing(output)
    found = open_conversion_model(directory, names=options.names, trust_remote_code=options.trust_remote_code)
    kept = _kept(directory, found, options.dtype)
    if notes := [note for note in (found.note, _rounded_note(kept), _modules_note(directory)) if note]:
        found = replace(found, note="; ".join(notes))
    specs = {spec.name: spec for spec in cast_specs([*found.specs.values()], options.dtype, kept.names)}
    heads = _make_heads(directory, found, specs, options)
    # Before any stream is made: a second one of the same key would silently replace the first.
    _refuse_collisions([*specs, *found.tied], heads, options.layout)
    streams = {name: Stream(spec, found.source, found.stored[name]) for name, spec in specs.items()}
    streams |= {key: Stream(spec, head, key) for head in heads for key, spec in head.specs.items()}
    prefix = f"{_NESTED}." if options.layout == "nested" else ""
    placed = {prefix + name: _renamed(stream, prefix + name) for name, stream in streams.items()}
    names = [*streams, *found.tied]
    # Ranks that are told these names read them from the files. A
    # head's values are in this process only, so they plan alone.
    stored = {prefix + name: found.files[name] for name in specs} if found.files is not None and not heads else None
    return ConversionPlan(
        output=output,
        source=found.source,
        stored=stored,
        directory=directory,
        model=found,
        heads=tuple(heads),
        streams=placed,
        chunks=plan_chunks(stream.spec for stream in placed.values()),
        aliases={prefix + alias: prefix + kept for alias, kept in found.tied.items()},
        containers={prefix + name: (_NESTED, name) for name in names} if prefix else {},
        initial=_record(model, directory, found, heads, options),
    )


def _kept(directory: Path, model: ConversionModel, dtype: torch.dtype | None) -> Kept:
    """What ``from_pretrained`` in that dtype has in float32 all the same."""
    if dtype not in (torch.float16, torch.bfloat16) or model.blueprint is None:
        return Kept()
    config = read_config(directory) if (directory / CONFIG_FILE).is_file() else {}
    model_class, _ = model_class_of(config)
    return Kept() if model_class is None else model_class.kept_from(dtype, model.specs)


def _rounded_note(kept: Kept) -> str:
    if not kept.unknown:
        return ""
    return f"the model's class may keep tensors in float32, and some of them may be rounded: {kept.unknown}"


def _modules_note(directory: Path) -> str:
    """What to know of a sentence encoder: training starts from the model of config.json, which is its transformer."""
    modules = Modules(directory).with_weights if directory.is_dir() else []
    if not modules:
        return ""
    # The names of the whole depend on the library's version, so it is the library that has to give them.
    return (
        f"left out: {', '.join(module.folder for module in modules)}, with weights beside the transformer, which alone "
        "is in the checkpoint. To start from the whole encoder, save it from its library: "
        f"dcp.save(SentenceTransformer({str(directory)!r}).state_dict(), checkpoint_id=...)"
    )


def _make_heads(
    directory: Path, model: ConversionModel, specs: Mapping[str, TensorSpec], options: ConversionOptions
) -> list[Head]:
    dtype = _usual_dtype(specs)
    heads = []
    if options.future_predictor is not None:
        head_type, hidden = options.future_predictor, _hidden_size(directory, model)
        version = find_version(options.future_predictor_version)
        heads.append(
            make_head("future_predictor", lambda: future_predictor(head_type, hidden, version), options.seed, dtype)
        )
    for text in options.extra_modules:
        name, make = parse_extra_module(text)
        heads.append(make_head(name, make, options.seed, dtype))
    return heads


def _usual_dtype(specs: Mapping[str, TensorSpec]) -> torch.dtype | None:
    """The floating-point dtype of most elements."""
    # By elements, not by tensors: norms may be many and in float32, and still be a small part.
    counts: dict[torch.dtype, int] = {}
    for spec in specs.values():
        if spec.dtype.is_floating_point:
            counts[spec.dtype] = counts.get(spec.dtype, 0) + spec.numel
    return max(counts, key=lambda dtype: counts[dtype], default=None)


_WIDTHS = ("hidden_size", "n_embd", "d_model")
"""Its name in config.json: of most classes, and of older ones, such as GPT-2's and T5's."""


def _hidden_size(directory: Path, model: ConversionModel) -> int:
    config: Mapping[str, Any] = (model.blueprint.config if model.blueprint else None) or {}
    if not config and (directory / CONFIG_FILE).is_file():
        config = read_config(directory)
    # Of a model of several parts the width is in the config of one of them, such as "text_config".
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    sizes = (part[name] for part in parts for name in _WIDTHS if isinstance(part.get(name), int))
    size = next(sizes, None)
    if size is None:
        names = ", ".join(_WIDTHS)
        raise UsageError(f"{directory}: no config says a width ({names}), which the future predictor needs")
    return int(size)


def _refuse_collisions(names: Sequence[str], heads: Sequence[Head], layout: Layout) -> None:
    owners = dict.fromkeys(names, "the model")
    problems = []
    for head in heads:
        problems += [f"{key}: of {head.name} and of {owners[key]}" for key in head.tensors if key in owners]
        # The heads are looked up among each other, too: two of them may have the same keys.
        owners |= dict.fromkeys(head.tensors, head.name)
    if problems:
        lines = "\n  ".join(problems)
        raise UsageError(f"{len(problems)} keys would be used twice; nothing was written\n  {lines}")
    # In a flat checkpoint the model's keys lie beside those of the optimizer, the average and so on.
    taken = sorted(name for name in owners if name.split(".", 1)[0] in NOT_A_MODEL)
    if taken and layout == "flat":
        raise UsageError(
            f"tensors have names that a checkpoint uses for other things: {', '.join(taken)}. Nothing was written. "
            "Take --layout nested, which keeps the model under a key of its own"
        )


def _renamed(stream: Stream, key: str) -> Stream:
    return Stream(TensorSpec(key, stream.spec.shape, stream.spec.dtype), stream.source, stream.name)


def _config(directory: Path, model: ConversionModel) -> dict[str, Any] | None:
    """What the model computes with: its own config, or that of the directory where the model is another trainer's."""
    if model.blueprint is not None and model.blueprint.config is not None:
        return model.blueprint.config
    return effective_config(directory) if model.blueprint and (directory / CONFIG_FILE).is_file() else None


def _record(
    name: str, directory: Path, model: ConversionModel, heads: Sequence[Head], options: ConversionOptions
) -> InitialRecord:
    blueprint = model.blueprint
    config = _config(directory, model)
    return InitialRecord(
        source=directory.resolve().name if Path(name).exists() else name,
        source_format=detect_checkpoint_format(directory).name,
        names=model.names,
        cast_to=None if options.dtype is None else dtype_name(options.dtype),
        model_class=blueprint.model_class if blueprint else None,
        config=config,
        config_xxh3_128=None if config is None else config_hash(config),
        tokenizer=hash_tokenizer(directory),
        buffers={name: BufferRecord.of(values) for name, values in blueprint.transient.items()} if blueprint else {},
        heads={head.name: tuple(head.tensors) for head in heads},
        seed=options.seed if heads else None,
    )
