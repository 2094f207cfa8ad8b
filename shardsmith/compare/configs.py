"""What two configs of one model say differently, defaults filled in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shardsmith.compare.effective import config_of
from shardsmith.compare.findings import Finding, one
from shardsmith.errors import UnsupportedFormatError
from shardsmith.hf.config_entries import QUANTIZATION
from shardsmith.hf.hf_directory import CONFIG_FILE, is_component
from shardsmith.hf.known_class import model_class_of
from shardsmith.manifest.metadata import read_json

# None is a value that a setting may have, so it cannot stand for one that is not there.
_ABSENT = object()
_NOT_THE_MODEL = frozenset(
    {
        "_name_or_path",
        "transformers_version",
        "_diffusers_version",
        "_use_default_values",
        "architectures",
        "auto_map",
        "id2label",
        "label2id",
        "finetuning_task",
        "task_specific_params",
        "tokenizer_class",
    }
)
_HARMLESS = frozenset(
    {
        "dtype",
        "torch_dtype",
        "use_cache",
        "initializer_range",
        "initializer_factor",
        "init_std",
        "embd_pdrop",
        "resid_pdrop",
        "attn_pdrop",
        "max_position_embeddings",
        "output_router_logits",
        "router_aux_loss_coef",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "sep_token_id",
        "gradient_checkpointing",
        "problem_type",
        "return_dict",
        "output_hidden_states",
        "output_attentions",
        "_attn_implementation",
        "fuse_cross_entropy",
        "fuse_norm",
        "fuse_swiglu",
    }
)
"""Settings that change no logit of the first step."""
_OF_TRAINING = ("dropout", "layerdrop", "drop_path")
"""Of the name of a setting, such as ``classifier_dropout``: it counts for nothing but while a model is trained."""
_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "norm_epsilon")


def effective_config(place: Path, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """A config.json, or that of a directory, with every default that its library fills in; as it stands if it cannot.

    Raises:
        CheckpointError: there is none, or it is no JSON object.
    """
    return filled_config(place, trust_remote_code=trust_remote_code)[0]


def filled_config(place: Path, *, trust_remote_code: bool = False) -> tuple[dict[str, Any], bool]:
    """As ``effective_config``; and whether the defaults are in it."""
    file = place / CONFIG_FILE if place.is_dir() else place
    written = read_json(file)
    if is_component(written):
        # The class fills in the defaults, and it takes a moment only: its model has no data.
        model_class, _ = model_class_of(written)
        return (written, False) if model_class is None else (dict(model_class.effective_config), True)
    try:
        return config_of(file, trust_remote_code=trust_remote_code).to_dict(), True
    except UnsupportedFormatError:
        return written, False


def compare_configs(model: Mapping[str, Any], other: Mapping[str, Any], origin: str) -> Iterator[Finding]:
    """Differences that matter, by what they do, and those that do not, as a note.

    Args:
        model: The config to judge.
        other: The config to compare it with.
        origin: Whose config the other one is, for people.
    """
    mine, theirs = _flat(model), _flat(other)
    names = _apart(mine, theirs)
    groups: dict[str, list[str]] = {}
    # One finding for each cause, with all of its settings.
    for name in names:
        groups.setdefault(_code(name), []).append(name)
    for code, settings in groups.items():
        yield one(code, settings, _listed(settings, mine), f"{_listed(settings, theirs)} in {origin}")


def settings_apart(
    model: Mapping[str, Any], other: Mapping[str, Any], *, as_loaded: bool = False, are_alike: bool = True
) -> dict[str, tuple[str, str]]:
    """Return the settings that may change what is computed, by their path with dots -> what each of the two says.

    Args:
        model: A config.
        other: Another.
        as_loaded: Both lie beside the tensors that are loaded with them, so that a quantisation counts.
        are_alike: The defaults are in both or in neither. Else a setting of the one alone may be the other's default.
    """
    mine, theirs = _flat(model), _flat(other)
    names = [name for name in _apart(mine, theirs) if _code(name) != "harmless-settings"]
    names = [name for name in names if are_alike or (name in mine and name in theirs)]
    if as_loaded and (QUANTIZATION in model) != (QUANTIZATION in other):
        mine, theirs = {**mine, QUANTIZATION: QUANTIZATION in model}, {**theirs, QUANTIZATION: QUANTIZATION in other}
        names.append(QUANTIZATION)
    return {name: (str(mine.get(name, "unset")), str(theirs.get(name, "unset"))) for name in names}


def _apart(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    return [name for name in dict.fromkeys([*mine, *theirs]) if _differs(name, mine, theirs)]


def _differs(name: str, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    # The first segment: inside "text_config" these names are settings of the model again.
    if name.split(".", 1)[0] in _NOT_THE_MODEL:
        return False
    one_value, other = mine.get(name, _ABSENT), theirs.get(name, _ABSENT)
    if _ABSENT in (one_value, other):
        # What only one of them says: nothing, unless it says more than the usual.
        return (one_value if other is _ABSENT else other) not in (None, False, [], {}) and _code(
            name
        ) != "config-differs"
    return bool(one_value != other)


# The last segment: a part's config, such as "text_config", has the settings of a whole one.
def _code(name: str) -> str:
    last = name.rsplit(".", 1)[-1]
    if last in _HARMLESS or any(word in last for word in _OF_TRAINING):
        return "harmless-settings"
    if "rope" in name or last == "partial_rotary_factor":
        return "rope-differs"
    return "norm-eps-differs" if last in _EPSILONS else "config-differs"


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names; rope_theta where transformers 5 has it, wherever it was written."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    # transformers 5 moves the old setting when it fills in
    # defaults; a config that it does not know is read as it stands.
    if f"{prefix}rope_theta" in flat and "rope_parameters." not in prefix:
        flat.setdefault(f"{prefix}rope_parameters.rope_theta", flat[f"{prefix}rope_theta"])
        del flat[f"{prefix}rope_theta"]
    return flat


def _listed(names: list[str], config: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {config.get(name, 'unset')}" for name in names)
