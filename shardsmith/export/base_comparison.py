"""Compare what is to be written with the base model and with the class that its config names, and adapt the config."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from shardsmith.errors import MismatchError
from shardsmith.hf.config_entries import QUANTIZATION
from shardsmith.hf.config_fit import ConfigFit, fit_config
from shardsmith.hf.directory import Measure, ModelPlan
from shardsmith.hf.directory_check import drop_advice, merge_advice, refusal
from shardsmith.hf.part_of_model import advice_for_part, part_by_itself
from shardsmith.hf.template import BaseTemplate
from shardsmith.name_maps.foreign import rival_models
from shardsmith.tensors.dtypes import is_quantized
from shardsmith.tensors.likeness import patterns_for
from shardsmith.tensors.tensors import TensorSpec

_FITS = "takes the tensors as they are"
_OF_OPTIMIZERS = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "sum", "master_param"}
_NAMED = 5
"""How many names an advice lists."""


def fit(
    path: Path,
    plan: ModelPlan,
    config: dict[str, Any],
    template: BaseTemplate,
    separate: Mapping[str, str],
    allow: Sequence[str] = (),
    live: Mapping[str, Any] | None = None,
    own: Mapping[str, TensorSpec] | None = None,
) -> ConfigFit:
    """Return the config for these tensors, which are those of the base and of the class that the config names.

    Args:
        path: Where the tensors are from, for the errors.
        plan: The planned tensors.
        config: Content of config.json.
        template: The tensors of the base model's files.
        separate: As ``fit_config`` takes them.
        allow: Patterns of tensors that the files need not have.
        live: As ``fit_config`` takes them.
        own: The tensors under the names that they have in the checkpoint, if these are others.

    Raises:
        MismatchError: they are not.
    """
    specs = {spec.name: spec for spec in plan.specs}
    fitted = fit_config(config, specs, base=template.specs, separate=separate, live=live, allow=allow)

    def advise_part(lacking: Sequence[str]) -> str:
        # Another number of layers, for one, is an entry of the config, and no part.
        if not lacking or any(not key.startswith("architectures") for key in fitted.keys):
            return ""
        return advice_for_part(lacking, specs, own or specs, config, template.path, fitted)

    if not (fitted.is_exact and (_was_quantized(template.specs, fitted) or _has_grown(plan, template, fitted, live))):
        heads = [name for name in fitted.head if _has_other_rows(name, specs, template.specs)]
        _compare_with_base(path, plan, template.specs, [*allow, *heads], fitted, advise_part)
    if fitted.problems:
        summary, lines, advice = refusal(fitted)
        part = (
            _no_model(plan)
            or advise_part(fitted.missing)
            or "\n".join([advice, *part_by_itself(own or specs, config, template.path)])
        )
        raise MismatchError(path, summary, lines, part)
    return fitted


def _has_grown(plan: ModelPlan, template: BaseTemplate, fitted: ConfigFit, live: Mapping[str, Any] | None) -> bool:
    """Whether a live model is the base model with another vocabulary, or with a head of its own, as its config says."""
    has_other_head = any(change.startswith("architectures") for change in fitted.changes)
    kept = all(name in {spec.name for spec in plan.specs} | plan.aliases.keys() for name in template.specs)
    return bool(live) and not fitted.is_another_model and (kept or has_other_head)


def _has_other_rows(name: str, specs: Mapping[str, TensorSpec], template: Mapping[str, TensorSpec]) -> bool:
    """Whether a tensor is the base model's but for its rows, one a class."""
    return name in template and specs[name].shape[1:] == template[name].shape[1:]


def _was_quantized(template: Mapping[str, TensorSpec], fitted: ConfigFit) -> bool:
    """Whether the base model is quantised and the tensors are not: then it has other names and shapes."""
    has_scheme = any(QUANTIZATION in change for change in fitted.changes)
    return has_scheme and any(is_quantized(spec) for spec in template.values())


def measure_of(fitted: ConfigFit, template: BaseTemplate) -> Measure:
    """Return what a plan was compared with."""
    return Measure(fitted.measured_by, template.origin if template.specs else None, fitted.reason)


def _compare_with_base(
    path: Path,
    plan: ModelPlan,
    template: Mapping[str, TensorSpec],
    allow: Sequence[str],
    fitted: ConfigFit,
    advise_part: Callable[[Sequence[str]], str],
) -> None:
    """Raise MismatchError if names or shapes are not those of the base model's weights.

    Args:
        path: Where the tensors are from, for the errors.
        plan: The planned tensors.
        template: The tensors of the base model's files.
        allow: Patterns of tensors that the files need not have.
        fitted: Says which ways out lead to a right export, and which do not.
        advise_part: Says what to do where tensors are missing and nothing else is wrong; empty where that is no part.
    """
    lines = differences(plan, template, allow) if template else []
    if lines:
        summary = f"{len(lines)} tensors are not as in the base model"
        held = {spec.name for spec in plan.specs}
        names = [line.split(": ", 1)[0] for line in lines]
        part = advise_part(names) if fitted.problems and held.isdisjoint(names) else ""
        advice = _rivals(plan, template) or _no_model(plan) or part or _advice(lines, held | template.keys(), fitted)
        raise MismatchError(path, summary, lines, advice)


def _rivals(plan: ModelPlan, template: Mapping[str, TensorSpec]) -> str | None:
    """What to do where several dicts of the checkpoint hold the whole model, such as a student and its teacher."""
    whole, rest = rival_models([spec.name for spec in plan.specs], template)
    if not whole:
        return None
    return (
        f"Nothing was written. Each of {', '.join(whole)} holds all tensors of the base model. Leave out all but the "
        f"one to export; for {whole[0]}: --drop {' '.join(rest)}"
    )


def _no_model(plan: ModelPlan) -> str | None:
    """What to do with tensors that have no names of a model: states of an optimizer, or an average that is a list."""
    names = [spec.name for spec in plan.specs if spec.numel > 1]
    ends = {name.rsplit(".", 1)[-1] for name in names}
    if ends and ends <= _OF_OPTIMIZERS:
        return "Nothing was written. These are states of an optimizer: give the file or folder with the model."
    if names and all(end.isdecimal() for end in ends):
        return (
            "Nothing was written. This is a list of tensors without names, as diffusers' EMAModel and torch_ema save "
            "an average. Load it there; its copy_to(model.parameters()) gives them names: save that model, and export "
            "it."
        )
    return None


def _advice(lines: Sequence[str], known: Collection[str], fitted: ConfigFit) -> str:
    """What to do about differences from the base. Only what gives an export that loads is offered.

    Args:
        lines: The differences.
        known: All names on either side.
        fitted: Says what the class takes.
    """
    if fitted.measured_by is None:
        return (
            "Nothing was written. If a difference is meant, allow it by name: --allow 'PATTERN'. To leave tensors "
            "of the checkpoint out: --drop 'PATTERN'."
        )
    if not fitted.problems:
        names = [line.split(": ", 1)[0] for line in lines]
        changes = f" config.json will be adapted ({'; '.join(fitted.changes)})." if fitted.changes else ""
        allowed = " ".join(f"'{pattern}'" for pattern in patterns_for(names, set(known).difference(names)))
        return (
            f"Nothing was written. {fitted.measured_by} {_FITS}. If the difference from the base is meant: "
            f"--allow {allowed}.{changes}"
        )
    if fitted.changed_modules:
        return merge_advice(fitted)
    if fitted.no_place and not fitted.keys:
        # What the class passes over would be refused next, for the base does not have it.
        differing = {line.split(": ", 1)[0] for line in lines}
        return drop_advice(fitted, [name for name in fitted.ignored if name in differing])
    said = [f"config.json says {key}" for key in fitted.keys]
    return "\n".join(
        [
            f"Nothing was written. As they are, {fitted.measured_by} would not load these tensors:",
            *(f"  {line}" for line in [*fitted.problems[:_NAMED], *said]),
            "Give a base model whose config.json is that of this model; config.json alone will do"
            + (f". Or correct {', '.join(key.split(':')[0] for key in fitted.keys)} there." if fitted.keys else "."),
        ]
    )


def advice_of_hooks(error: MismatchError, checkpoint: str | Path) -> str:
    """Return what to do where a hook exports, which leaves nothing out and allows nothing: the command does that.

    Args:
        error: What the command would raise.
        checkpoint: The saved step, or a word for one.
    """
    options = re.findall(r"--(?:drop|allow)(?: '[^']+')+", error.advice)
    if not options:
        return error.advice
    advice = "Nothing was written. Give the base model that this one was made from."
    if _FITS in error.advice:
        advice += " If the difference is meant, give its directory without the files of weights: HFExport needs none."
    command = f"shardsmith to-hf --checkpoint {checkpoint} --base-model BASE --output-dir DIRECTORY {' '.join(options)}"
    return f"{advice} If it is that one, leave HFExport out and export saved steps:\n{command}"


def differences(
    plan: ModelPlan, template: Mapping[str, TensorSpec], allow: Sequence[str], prefix: str = ""
) -> list[str]:
    """Return a line for each tensor whose name, shape or kind of dtype is not as in the base model's weights.

    Args:
        plan: The planned tensors.
        template: Those of the base model's files.
        allow: Patterns of names that may differ, with the prefix.
        prefix: What the lines put before a name.
    """
    ours = {spec.name: spec for spec in plan.specs}
    problems = {name: "in the base model, not in the checkpoint" for name in template if name not in ours}
    problems |= {name: "in the checkpoint, not in the base model" for name in ours if name not in template}
    problems |= {
        name: f"{spec.shape} in the checkpoint, {template[name].shape} in the base model"
        for name, spec in ours.items()
        if name in template and spec.shape != template[name].shape
    }
    problems |= {
        name: f"{spec.dtype} in the checkpoint, {template[name].dtype} in the base model"
        for name, spec in ours.items()
        if name in template
        and name not in problems
        and spec.dtype.is_floating_point != template[name].dtype.is_floating_point
    }
    return [
        f"{prefix}{name}: {problem}"
        for name, problem in sorted(problems.items())
        if name not in plan.aliases and not any(fnmatchcase(prefix + name, pattern) for pattern in allow)
    ]
