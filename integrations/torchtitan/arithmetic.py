"""What the model of a config computes beyond the settings that are compared one by one, found by running it small.

Classes of transformers that have the same names and shapes may compute other things: Granite's scales its embeddings,
and an option such as ``hidden_act`` is in no tensor. TorchTitan's models compute what one class each of transformers
does with its defaults. A small model of the source's own config is compared with a small one of that class.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shardsmith.hf.transformers_class import quiet_transformers
from shardsmith.load.faults import LoadFault
from shardsmith.load.live_weights import LiveWeights

from .models import package_of

log = logging.getLogger(__name__)

_TYPES = {
    "llama3": ("llama",),
    "qwen3": ("qwen3", "qwen3_moe"),
    "deepseek_v3": ("deepseek_v3",),
}
"""Package of a model in ``torchtitan.models``: the ``model_type`` that it computes, without and with experts."""
_COMPARED = {
    *("num_attention_heads", "num_key_value_heads", "head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    *("num_experts_per_tok", "norm_topk_prob", "routed_scaling_factor", "n_group", "topk_group"),
    *("rms_norm_eps", "tie_word_embeddings", "rope_parameters"),
}
"""Settings that are compared by themselves."""
_SIZES = {
    *("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers"),
    *("n_routed_experts", "num_experts", "num_local_experts", "n_shared_experts", "kv_lora_rank", "q_lora_rank"),
    *("max_position_embeddings", "first_k_dense_replace", "decoder_sparse_step", "mlp_only_layers"),
}
"""Settings that tensors show by their shapes and names."""
_SMALL = {
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "vocab_size": 64,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "first_k_dense_replace": 1,
}
_HEAD, _GROUPS, _WINDOW = 16, 2, 4
_LAYERS, _TOKENS = 4, 24
_NEAR = 1e-3


def arithmetic_faults(live: LiveWeights, config: Mapping[str, Any], origin: str) -> list[LoadFault]:
    """Return what a config makes transformers compute that a model of TorchTitan does not. No communication.

    Nothing is said of models that are not TorchTitan's own, and of configs whose tensors have other names or shapes:
    these are found when they are loaded.

    Args:
        live: A model of TorchTitan.
        config: Of the source, with every default filled in.
        origin: Where the config is from, for people.
    """
    kind = _type_of(live.parts[0])
    if kind is None:
        return []
    theirs = str(config["model_type"])
    try:
        small = _smaller(config, _longest(live))
        found = _logits(theirs, small)
        shared = {name: value for name, value in small.items() if name in _COMPARED | _SIZES}
        expected = found if theirs == kind else _logits(kind, shared)
        defaults = _config_of(kind, shared).to_dict()
        faults = []
        if theirs == kind or _differ(expected, found):
            faults = list(_culprits(theirs, small, defaults, found, expected, origin))
        if _differ(expected, found) and not faults:
            words = f"{kind} is what the trainer computes, {theirs} is in {origin}, and computes other values"
            faults.append(LoadFault("config-differs", "model_type", words))
        return faults
    except Exception as error:  # whatever a config that nobody foresaw makes a class raise
        log.warning("what %s computes beyond its settings is not compared: %s", origin, error)
        return []


def _longest(live: LiveWeights) -> float:
    """Tokens of the longest sequence that the model takes, as its rotary tables show."""
    return max((len(table) for table in live.transient().values() if table.dim() == 2), default=math.inf)


def _type_of(model: nn.Module) -> str | None:
    types = _TYPES.get(package_of(model) or "")
    if types is None:
        return None
    has_experts = any(hasattr(module, "score_func") for module in model.modules())
    return types[-1] if has_experts else types[0]


def _culprits(
    kind: str,
    small: Mapping[str, Any],
    defaults: Mapping[str, Any],
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    origin: str,
) -> Iterator[LoadFault]:
    """Each setting that changes what the source computes if it is as in the trainer.

    Of another class only a setting that makes it compute what the trainer does.
    """
    for name, value in small.items():
        ours = defaults.get(name)
        if name in _COMPARED | _SIZES | {"model_type"} or ours == value:
            continue
        with contextlib.suppress(Exception):  # settings that do not go together
            changed = _logits(kind, {**small, name: ours})
            if _differ(changed, found) and (expected is found or not _differ(changed, expected)):
                words = f"{ours} is what the trainer computes, {value} is in {origin}"
                yield LoadFault("config-differs", name, words)


def _smaller(config: Mapping[str, Any], longest: float) -> dict[str, Any]:
    """The config of a small model of the same kind. It has each kind of layer, as far as lists say what there is."""
    layers, heads = int(config["num_hidden_layers"]), int(config["num_attention_heads"])
    lists = [name for name, value in config.items() if isinstance(value, list) and len(value) == layers]
    kinds: dict[tuple[str, ...], int] = {}
    for index in range(layers):
        kinds.setdefault(tuple(repr(config[name][index]) for name in lists), index)
    chosen = sorted({*list(kinds.values())[:_LAYERS], *range(min(layers, _LAYERS))})
    small: dict[str, Any] = {name: [config[name][index] for index in chosen] for name in lists}
    small |= {name: value for name, value in _SMALL.items() if isinstance(config.get(name), int)}
    groups = int(config.get("num_key_value_heads") or heads)
    small["num_key_value_heads"] = min(groups, _GROUPS)
    small["num_attention_heads"] = heads // groups * small["num_key_value_heads"]
    small["hidden_size"] = small["num_attention_heads"] * _HEAD
    if "qk_rope_head_dim" not in config:
        small["head_dim"] = _HEAD
    if isinstance(window := config.get("sliding_window"), int):
        small["sliding_window"] = _WINDOW if window < longest else _TOKENS
    return {**config, **small, "num_hidden_layers": len(chosen), **{name: 0 for name in _TOKEN_IDS if config.get(name)}}


_TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
"""They may be beyond the vocabulary of a small model."""


def _config_of(kind: str, settings: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    given = {name: copy.deepcopy(value) for name, value in settings.items() if name not in ("model_type", "dtype")}
    return AutoConfig.for_model(kind, **given)


def _logits(kind: str, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a model of these settings answers, and the names and shapes of its tensors, whose values follow from them.

    The random numbers of the process stay as they are.
    """
    from transformers import AutoModelForCausalLM

    with quiet_transformers(), torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        model = AutoModelForCausalLM.from_config(_config_of(kind, settings), attn_implementation="eager")
        model = model.float().eval()
        generator = torch.Generator("cpu").manual_seed(0)
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator, device="cpu")
                tensor.copy_(noise * (0.2 if tensor.dim() > 1 else 0.1))
        tokens = torch.arange(_TOKENS, device="cpu").view(1, -1) * 7 % int(settings["vocab_size"])
        logits = model(input_ids=tokens, use_cache=False).logits
    return {"": logits, **{name: torch.empty(t.shape, device="meta") for name, t in model.state_dict().items()}}


def _differ(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    if {name: tensor.shape for name, tensor in one.items()} != {name: tensor.shape for name, tensor in other.items()}:
        return False
    return bool((one[""] - other[""]).abs().max() > _NEAR * one[""].abs().max())
