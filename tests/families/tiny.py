"""Every model class of transformers' auto mappings, as small as its config lets it be.

Nothing here knows a family by its name: fields are made small by what they are called, at every depth of the config.
What cannot be made small that way is left out, with the reason.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

MOST_PARAMETERS = 45_000_000
_PREFERRED = (
    "MODEL_FOR_CAUSAL_LM",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT",
    "MODEL_FOR_MULTIMODAL_LM",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ",
    "MODEL_FOR_MASKED_LM",
    "MODEL_FOR_IMAGE_CLASSIFICATION",
    "MODEL_FOR_AUDIO_CLASSIFICATION",
    "MODEL_FOR_CTC",
)
"""Mappings whose class stands for its model type where one is to be enough."""


_BY_DEPTH = ("out_features", "out_indices", "stage_names")
"""What a config works out from its depth if it is not told."""


_FILLED = {"vocab_size": 128, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}
_FILLED |= {"head_dim": 16, "num_key_value_heads": 2, "prediction_length": 8}
"""What some configs leave to whoever makes one."""


class NotTinyError(Exception):
    """A class cannot be made small from its config alone."""


@dataclass(frozen=True, slots=True)
class Family:
    """A model class, and where the library lists it."""

    kind: str
    """Name of the class."""
    model_type: str
    mappings: tuple[str, ...]
    """Such as MODEL_FOR_CAUSAL_LM."""


def all_families() -> list[Family]:
    """Every class of every mapping of the auto classes, sorted by name; one of several model types under its own."""
    types: dict[str, dict[str, None]] = {}
    mappings: dict[str, dict[str, None]] = {}
    for name, mapping in vars(modeling_auto).items():
        if not (name.startswith("MODEL_") and name.endswith("_MAPPING_NAMES")):
            continue
        for model_type, kinds in mapping.items():
            for kind in (kinds,) if isinstance(kinds, str) else kinds:
                types.setdefault(kind, {})[model_type] = None
                mappings.setdefault(kind, {})[name.removesuffix("_MAPPING_NAMES")] = None
    return [
        Family(kind, max(types[kind], key=lambda t: _likeness(kind, t)), tuple(mappings[kind]))
        for kind in sorted(types)
    ]


def one_of_each_type() -> list[Family]:
    """For each model type the class that people train most often."""

    def rank(family: Family) -> int:
        return min((_PREFERRED.index(name) for name in family.mappings if name in _PREFERRED), default=len(_PREFERRED))

    best: dict[str, Family] = {}
    for family in all_families():
        if family.model_type not in best or rank(family) < rank(best[family.model_type]):
            best[family.model_type] = family
    return list(best.values())


def _likeness(kind: str, model_type: str) -> int:
    """How much of the class's name is that of the model type."""
    plain = re.sub(r"[_-]", "", model_type).lower()
    return len(plain) if kind.lower().startswith(plain) else 0


def make_tiny(family: Family, seed: int = 0) -> Any:
    """The model on the CPU in evaluation mode, no two tensors alike. Raises NotTinyError with the reason."""
    try:
        kind = getattr(transformers, family.kind)
        config_class = getattr(kind, "config_class", None) or CONFIG_MAPPING[family.model_type]
    except (AttributeError, KeyError, ImportError) as error:
        raise NotTinyError(_first_line(error)) from error
    reason = ""
    for sizes in _TRIED:
        try:
            return _built(kind, _tiny_config(config_class, sizes), seed)
        except Exception as error:  # whatever a config with these sizes makes the class raise
            reason = reason or _first_line(error)
    raise NotTinyError(reason)


@dataclass(frozen=True, slots=True)
class _Sizes:
    """How small: None leaves widths as they are, and makes depth and vocabulary small only."""

    width: int | None
    heads: int | None
    head: int | None
    filled: bool = False
    """Whether fields that are None get a value, too."""


_TRIED = (
    *(_Sizes(32, 2, 16), _Sizes(32, 4, 16), _Sizes(64, 4, 16), _Sizes(64, 2, 32), _Sizes(64, 4, 16, filled=True)),
    *(_Sizes(None, None, None), _Sizes(None, None, None, filled=True)),
)


def _built(kind: Any, config: Any, seed: int) -> Any:
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in kind._from_config(copy.deepcopy(config)).parameters())
    if count > MOST_PARAMETERS:
        raise NotTinyError(f"has {count:,} parameters when it is as small as its config lets it be")
    torch.manual_seed(seed)
    model = kind._from_config(copy.deepcopy(config), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.requires_grad:  # what is not trained may be computed anew
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


def _tiny_config(config_class: Any, sizes: _Sizes) -> Any:
    content = config_class().to_dict()
    small = _small(content, sizes)
    accepted = {"model_type", "transformers_version", "dtype", "torch_dtype", "_name_or_path", "architectures"}
    return config_class(**{key: value for key, value in small.items() if key not in accepted})


def _small(config: Mapping[str, Any], sizes: _Sizes) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if value is None and key in _FILLED and sizes.filled:
            changed[key] = _FILLED[key]
        if value is None or key in _BY_DEPTH:
            continue
        if isinstance(value, Mapping) and (key.endswith("config") or "model_type" in value):
            changed[key] = _small(value, sizes) if key != "quantization_config" else value
        else:
            changed[key] = _small_field(key, value, sizes)
    text = changed.get("text_config")
    if "video_token_id" in config and isinstance(text, dict) and isinstance(text.get("rope_parameters"), dict):
        text["rope_parameters"].setdefault("mrope_section", [])  # the class has one by default, for its usual heads
        _fit_heads(text)
    _fit_token_ids(changed)
    _fit_layers(changed, config)
    _fit_heads(changed)
    return changed


_RULES: list[tuple[str, Callable[[int, _Sizes], int]]] = [
    (r"num_feat_extract_layers", lambda value, _: value),
    (r"image_token_id|.*_token_(id|index)$|.*_ids?$", lambda value, _: value),
    (r".*vocab_size.*|.*codebook_size$", lambda value, _: min(value, 128)),
    (r".*(experts_per_tok|top_?k|experts_per_token|num_selected_experts)$", lambda value, _: min(value, 2)),
    (r"n_group|topk_group|num_expert_group", lambda _value, _: 1),
    (r".*num_(local_|routed_)?experts$|n_routed_experts|moe_num_experts|num_experts", lambda value, _: min(value, 4)),
    (r"first_k_dense_replace", lambda value, _: min(value, 1)),
    (r"(.*_)?d_head", lambda value, sizes: sizes.head or value),
    (r".*(num_|n_)?(key_value|kv)_?heads?$", lambda value, sizes: min(value, sizes.heads or value)),
    (r".*(num|n)_.*heads?$|.*_heads?$|n_head|heads", lambda value, sizes: min(value, sizes.heads or value)),
    (r".*(n|num)_?.*(layers?|blocks|stages)$|.*_layers?$|depth|.*_depth$", lambda value, _: min(value, 2)),
    (r".*image_size$|.*img_size$|input_size", lambda value, _: min(value, 64)),
    (r".*patch_size$", lambda value, _: min(value, 8)),
    (r".*(max_.*positions?.*|max_.*_embeddings|n_positions|max_.*length.*)", lambda value, _: min(value, 128)),
    (r".*conv.*groups$", lambda value, _: min(value, 4)),
    (r".*(window|kernel|stride|crop|bin|channels|groups|ratio|factor|chunk|block_size).*", lambda value, _: value),
    (r".*(rope|nope|v|qk)_head_dim$|.*head_dim$|d_kv|head_size|.*head_size$", lambda value, sizes: sizes.head or value),
    (r".*(lora_rank|_rank)$", lambda value, _: min(value, 16)),
    (
        r".*(intermediate|ffn|inner|mlp).*(size|dim|hidden.*)$|n_inner|d_ff|.*ffn_dim",
        lambda value, sizes: value if sizes.width is None else min(value, sizes.width + sizes.width // 2),
    ),
    (
        r".*(hidden|embed|model|proj|state|width|latent|output).*(size|dim|d|width)$|d_model|n_embd|dim|width|hidden_size"
        r"|.*_dim$|.*_width$",
        lambda value, sizes: value if sizes.width is None else min(value, sizes.width),
    ),
]


def _small_field(key: str, value: Any, sizes: _Sizes) -> Any:
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return next((rule(value, sizes) for pattern, rule in _RULES if re.fullmatch(pattern, key)), value)
    if isinstance(value, list) and value and all(type(one) is int for one in value):
        if re.search(r"depth|layers|blocks", key):
            return [min(one, 1) for one in value]
        if re.search(r"heads", key):
            return [min(one, sizes.heads or one) for one in value]
        if re.search(r"hidden_sizes|embed_dims|dims|widths|channels|sizes", key) and sizes.width is not None:
            ordered = sorted(set(value))
            return [sizes.width * (ordered.index(one) + 1) for one in value]
    return value


def _fit_token_ids(config: dict[str, Any]) -> None:
    """Ids of special tokens that are beyond the small vocabulary become its last ones, each its own."""
    vocabulary = config.get("vocab_size") or _text_vocabulary(config)
    if not isinstance(vocabulary, int):
        return
    free = vocabulary - 1
    for key, value in list(config.items()):
        if re.search(r"token_(id|index)$|_id$", key) and type(value) is int and value >= vocabulary:
            config[key], free = free, free - 1


def _text_vocabulary(config: Mapping[str, Any]) -> int | None:
    parts = [part for part in config.values() if isinstance(part, Mapping) and "vocab_size" in part]
    return parts[0]["vocab_size"] if parts else None


_DEPTHS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "depth")


def _fit_layers(config: dict[str, Any], before: Mapping[str, Any]) -> None:
    """What says something for each layer says it for those that are left, of each kind of layer one if possible."""
    name = next((name for name in _DEPTHS if isinstance(config.get(name), int)), None)
    if name is None:
        return
    layers, old = config[name], before[name]
    for key, value in list(config.items()):
        if isinstance(value, list) and len(value) == old and all(isinstance(one, str | int | float) for one in value):
            kinds = list(dict.fromkeys(value)) if isinstance(value[0], str) else []
            config[key] = (kinds + value)[:layers]
        elif key.startswith("per_layer") and isinstance(value, Mapping):
            config[key] = {layer: said for layer, said in value.items() if int(layer) < layers}
        elif key == "attention_types":  # such as [[["global", "local"], 12]]: kinds, and how often they come
            config[key] = [[kinds, max(1, layers // len(kinds))] for kinds, _ in value][:1]
    for key in ("attention_layers", "layers_block_type"):
        if isinstance(config.get(key), list):
            config[key] = config[key][:layers]


def _fit_heads(config: dict[str, Any]) -> None:
    """Heads that make up a width between them, and sections that make up half a head."""
    width, count = config.get("hidden_size"), config.get("num_attention_heads")
    expand = config.get("mamba_expand", config.get("expand"))
    for heads, head in (("mamba_n_heads", "mamba_d_head"), ("num_heads", "head_dim")):
        if expand and isinstance(width, int) and heads in config and head in config:
            config[head] = int(expand * width) // config[heads]
    size = config.get("head_dim")
    if not isinstance(size, int) and isinstance(width, int) and count:
        size = width // count
    for part in (config.get("rope_parameters"), config.get("rope_scaling")):
        if not isinstance(part, dict):
            continue
        if part.get("rope_type") == "default" and part.get("rope_theta") is None:
            part["rope_theta"] = 10_000.0
        if "mrope_section" in part and isinstance(size, int):
            third = size // 2 // 3
            part["mrope_section"] = [size // 2 - 2 * third, third, third]


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {' '.join(lines)[:200]}"
