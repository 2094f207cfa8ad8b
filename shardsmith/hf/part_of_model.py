"""A checkpoint that holds a part of a model: what it lacks, and what it is complete as."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from shardsmith.hf.config_attempt import TIE, Attempt, Excused, subsets
from shardsmith.hf.config_entries import Config, dotted, entries, with_values
from shardsmith.hf.config_fit import ConfigFit
from shardsmith.tensors.likeness import patterns_for
from shardsmith.tensors.tensors import TensorSpec

_NAMED = 5
"""How many patterns of names an advice lists."""


def advice_for_part(
    lacking: Sequence[str],
    specs: Mapping[str, TensorSpec],
    own: Mapping[str, TensorSpec],
    config: Config,
    base: Path,
    fitted: ConfigFit,
) -> str:
    """Return what to do about a checkpoint of which nothing is wrong but that it lacks tensors of the model.

    Only what gives an export that loads is offered.

    Args:
        lacking: Names of these, as the base model has them.
        specs: The tensors as they would be written.
        own: The same under the checkpoint's own names.
        config: Content of the base model's config.json.
        base: The base model's directory.
        fitted: What its class makes of the tensors.
    """
    patterns = patterns_for(lacking, specs)
    # Of the cures that only change the config: the base model's weights have these tensors all the same.
    allowed = f"--allow {' '.join(map(repr, patterns))}"
    more = f" and {len(patterns) - _NAMED} more" if len(patterns) > _NAMED else ""
    lines = [
        f"Nothing was written. The checkpoint holds a part of the model, {len(specs)} of {len(specs) + len(lacking)} "
        f"tensors, and nothing of {', '.join(patterns[:_NAMED])}{more}."
    ]
    lines += part_by_itself(own, config, base)
    if key := _tie(config, specs):
        lines.append(
            f"If the missing head was tied to the embeddings in training, let config.json say {key}: true, and give "
            f"{allowed}."
        )
    lines += [
        f"To export it without, correct config.json, which says {key}; and give {allowed}." for key in fitted.keys
    ]
    lines.append(
        "To export the whole model, save all its tensors, or load the checkpoint into the base model and save that: "
        "nothing is taken from the base model here."
    )
    return "\n".join(lines)


def part_by_itself(own: Mapping[str, TensorSpec], config: Config, base: Path) -> list[str]:
    """Return how tensors are exported that are, by their own names, a whole part of a composed model; else nothing.

    Args:
        own: The tensors under the checkpoint's own names.
        config: Content of the base model's config.json.
        base: The base model's directory.
    """
    for key, part in Attempt.of(config, own, {}).effective.items():
        found = Attempt.of(part, own, {}) if isinstance(part, Mapping) and "model_type" in part else None
        if found is not None and found.fit is not None and found.fit.is_exact:
            load = f"AutoConfig.from_pretrained('{base}').{key}.save_pretrained('PART')"
            return [
                f"By itself it is {found.fit.model_class}, as {key} of config.json describes it. To export that, make "
                "it the base model:",
                f'  python -c "from transformers import AutoConfig; {load}"',
                "and give --base-model PART; copy the tokenizer there, if it is to be in the export.",
            ]
    return []


def _tie(config: Config, specs: Mapping[str, TensorSpec]) -> str:
    """Name the entries of a config with which the class takes what is missing from its embeddings; empty without."""
    flags = [path for path, _ in entries(Attempt.of(config, specs, {}).effective) if path[-1] == TIE]
    for chosen in subsets(flags):
        found = Attempt.of(with_values(config, dict.fromkeys(chosen, True)), specs, {})
        if found.fit is not None and not found.problems(Excused()):
            return dotted(chosen)
    return ""
