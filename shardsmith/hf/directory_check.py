"""The check of a finished Hugging Face directory, before it is published: the same for every way to make one.

It looks at what lies on disk, as a loader does: config.json, the headers of the weights, and all other files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from shardsmith.errors import CheckpointError, CorruptCheckpointError, MismatchError
from shardsmith.formats.safetensors_files.source import open_safetensors_directory
from shardsmith.ground.layout import COMPONENT_WEIGHTS, MAIN_WEIGHTS
from shardsmith.hf.base_files import choose_files, is_read_by_loaders
from shardsmith.hf.config_fit import ConfigFit, fit_config
from shardsmith.hf.directory import DirectoryPlan, Measure, ModelPlan
from shardsmith.hf.hf_directory import CONFIG_FILE, main_stem, read_config
from shardsmith.hf.model_code import refuse_missing_code
from shardsmith.hf.vocabulary import say_of_tokenizer
from shardsmith.tensors.tensors import TensorSpec


def check_directory(plan: DirectoryPlan, directory: Path) -> Measure:
    """Compare a complete directory with the class that its own config.json names; what it was compared with.

    On rank 0, any thread; no communication. Costs nothing where the plan was compared before.

    Raises:
        MismatchError: names, shapes or the config are not those of the class, or another file holds weights that a
            loader would take.
        CorruptCheckpointError: the files do not hold the tensors that were planned.
    """
    # What lies on disk, not the plan: this is the last look before it becomes visible.
    for model in plan.models:
        _check_headers(model, directory)
    # Before the class: a loader that finds two files of weights may take the wrong one, however right ours is.
    _refuse_other_weights(plan, directory)
    config_file = directory / CONFIG_FILE
    if not config_file.is_file():
        return Measure(None, plan.measure.base, "it has no config.json")
    config = json.loads(config_file.read_text())
    wanted = main_stem(config)
    # diffusers and transformers look for different names, and load nothing under the other's.
    if other := [m.stem for m in plan.models if m.stem in (MAIN_WEIGHTS, COMPONENT_WEIGHTS) and m.stem != wanted]:
        summary = "the weights are not called as the library of its config wants them"
        raise MismatchError(plan.output, summary, [f"{other[0]}: must be {wanted}"], "Nothing was written.")
    # What the base's class says of the base's files is excused, and not what an adapted config's says of them.
    of_base = read_config(plan.base) if plan.base is not None and plan.template else None
    # The same specs and the same config were judged for the plan, so the answer is remembered.
    tokenizer = ""
    for model in (model for model in plan.models if not model.is_module):
        found = fit_config(config, _specs(model), base=plan.template, of_base=of_base, allow=plan.allow)
        if found.changes or found.problems:
            raise MismatchError(directory, *refusal(found))
        before = read_config(plan.base) if plan.base is not None else config
        tokenizer = tokenizer or say_of_tokenizer(directory, _specs(model), before, config)
    refuse_missing_code(plan.output, found, {str(path.relative_to(directory)) for path in directory.rglob("*.py")})
    return Measure(found.measured_by, plan.measure.base, found.reason, tokenizer)


def refusal(found: ConfigFit) -> tuple[str, list[str], str]:
    """Return what an error says about a config that does not describe the tensors: summary, lines, advice."""
    if found.problems:
        summary = f"{len(found.problems)} tensors are not as in {found.measured_by}, which config.json describes"
    else:
        summary = f"config.json does not describe the tensors, which {found.measured_by} has with another one"
    lines = [*(found.problems or found.changes), *(f"config.json says {key}" for key in found.keys)]
    if found.changed_modules:
        return summary, lines, merge_advice(found)
    if found.no_place and not found.keys:
        return summary, lines, drop_advice(found)
    advice = (
        "Nothing was written. Give the base model's directory whose config.json is that of this model"
        + (f"; or correct {', '.join(key.split(':')[0] for key in found.keys)} there" if found.keys else "")
        + "."
    )
    return summary, lines, advice


def drop_advice(found: ConfigFit, ignored: Sequence[str] = ()) -> str:
    """Return what to do about tensors that a class has no place for, such as those of a critic's head.

    ``ignored``: those that it passes over when it loads.
    """
    names = " ".join(f"'{name}'" for name in [*found.no_place, *ignored])
    return f"Nothing was written. {found.measured_by} has no place for these. To leave them out: --drop {names}"


def merge_advice(found: ConfigFit) -> str:
    """Return what to do where modules of the model hold more than their class has, such as low-rank adapters.

    Without these tensors it would be another model than the one that was trained, so ``--drop`` is not offered.
    """
    module, names = next(iter(found.changed_modules.items()))
    more = f" (and {others} more like it)" if (others := len(found.changed_modules) - 1) else ""
    return (
        f"Nothing was written. {module} of the checkpoint{more} holds {', '.join(names)}, for which "
        f"{found.measured_by} has no place. Without them it is another model than was trained. If they are LoRA "
        "matrices or a parametrization such as weight_norm, merge them into the weight (a LoRA's library has a "
        "command or method for it; torch.nn.utils.parametrize.remove_parametrizations), save the model, and export "
        "that."
    )


def _check_headers(model: ModelPlan, directory: Path) -> None:
    """Open the weights as a loader does, by their stem, and compare the headers with the plan."""
    source = open_safetensors_directory(directory, model.stem)
    source.close()
    if dict(source.specs) != _specs(model):
        raise CorruptCheckpointError(directory, f"the headers of {model.stem} are not those that were planned")


def _refuse_other_weights(plan: DirectoryPlan, directory: Path) -> None:
    """Raise MismatchError if a file that is none of ours would be loaded, or holds the model's weights."""
    ours = {name for model in plan.models for name in model.file_names}
    # Beside an adapter its config is ours, and no stray.
    if any(model.stem.startswith("adapter_model") for model in plan.models):
        ours.add("adapter_config.json")
    lines = [
        f"{name}: a loader would take it for the weights, or load it on top of them"
        for name in sorted(path.name for path in directory.iterdir())
        if name not in ours and is_read_by_loaders(name)
    ]
    if not lines:
        specs = {name: spec for model in plan.models for name, spec in _specs(model).items()}
        lines = _copies_of_the_model(directory, specs, ours)
    if lines:
        summary = f"{len(lines)} files hold weights beside those that were written"
        raise MismatchError(plan.output, summary, lines, "Nothing was written. Leave these files out.")


# What ``choose_files`` would not copy from a base model must not lie in a directory that we make.
def _copies_of_the_model(directory: Path, specs: Mapping[str, TensorSpec], ours: set[str]) -> list[str]:
    try:
        found = choose_files(directory, specs, trust_remote_code=True).left_out
    except CheckpointError:
        return []
    return [f"{name}: {reason}" for name, reason in found.items() if name not in ours and "/" not in name]


def _specs(model: ModelPlan) -> dict[str, TensorSpec]:
    return {spec.name: spec for spec in model.specs}
