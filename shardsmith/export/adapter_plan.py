"""Work out the directory of an adapter alone, as ``PeftModel.save_pretrained`` writes it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from shardsmith.export.adapters import ADAPTER_WEIGHTS, AdapterCheckpoint, is_peft
from shardsmith.export.plan import ExportOptions, ExportPlan, like, origin_of, plan_directory
from shardsmith.formats.by_path import KnownCheckpoint, known_checkpoint
from shardsmith.formats.models import ModelSource
from shardsmith.ground import layout
from shardsmith.ground.commit import refuse_existing
from shardsmith.hf.directory import DirectoryPlan, plan_model
from shardsmith.hf.hf_directory import protect
from shardsmith.hf.template import BaseTemplate
from shardsmith.tensors.checkpoint_keys import EMA


def plan_export(
    checkpoint: Path | KnownCheckpoint, output: Path, base: Path, stems: Mapping[str, str], options: ExportOptions
) -> ExportPlan:
    """Plan the directory of a model, or of an adapter alone. Writes nothing. Args and errors as ``plan_directory``."""
    checkpoint = known_checkpoint(checkpoint)
    adapter = plan_adapter(checkpoint, output, base, stems, options)
    return adapter or plan_directory(checkpoint, output, base, stems, options)


def plan_adapter(
    checkpoint: KnownCheckpoint, output: Path, base: Path, stems: Mapping[str, str], options: ExportOptions
) -> ExportPlan | None:
    """Plan the directory of an adapter; None where it is not asked for, or the checkpoint holds none. Writes nothing.

    Args:
        checkpoint: The checkpoint, whose format is known.
        output: The directory to make.
        base: The base model's directory, of which config.json is needed.
        stems: As ``plan_directory`` takes them; the adapter's weights are ``adapter_model.safetensors`` instead.
        options: How to do it.

    Raises:
        ProtectedPathError, TargetExistsError: the output is no place to write to.
        UsageError: the adapter's config is missing, or peft is.
        CheckpointError: the checkpoint or the base cannot be used.
    """
    # Opened for their names alone: these tell whether there is an adapter at all.
    opened = {model: _open(checkpoint, model, options) for model in stems}
    # With a model among them that has none, the directory is that of a model.
    if options.adapters != "adapter" or not all(map(is_peft, opened.values())):
        for source in opened.values():
            source.close()
        return None
    protect(output, checkpoint.path, base)
    refuse_existing(output)
    adapters = {model: AdapterCheckpoint(checkpoint.path, base, source) for model, source in opened.items()}
    sources: dict[str, ModelSource] = {model: adapter.adapter() for model, adapter in adapters.items()}
    models = tuple(
        plan_model(
            model,
            list(source.specs.values()),
            # peft looks for ``adapter_model``; an average beside it keeps a name of its own.
            stem=layout.EMA_WEIGHTS if stems[model] == layout.EMA_WEIGHTS else ADAPTER_WEIGHTS,
            dtype=options.dtype,
            max_shard_size=None,  # peft reads one file
            aliases={},
        )
        for model, source in sources.items()
    )
    # One config for all: main and average are of one run.
    write_config = next(iter(adapters.values())).write_config
    directory = DirectoryPlan(output, models, origin_of(checkpoint), None, companions=write_config)
    template = BaseTemplate(base, None, {}, "an adapter is compared with the layers that its config describes")
    return ExportPlan(directory, checkpoint, base, sources, options.verify, template)


def _open(checkpoint: KnownCheckpoint, model: str, options: ExportOptions) -> ModelSource:
    opened = checkpoint.open(_named(model, options))
    # Before an adapter is looked for: of several, one may be left then.
    return opened.without(like(opened, options.drop)) if is_peft(opened) else opened


def _named(model: str, options: ExportOptions) -> str:
    return f"{model}:{options.average}" if options.average and model == EMA else model
