"""Compare what a live model of TorchTitan computes with, setting by setting, with the config.json of its source.

TorchTitan computes with its own config; nothing compares it with the config of the model whose weights it loads. Shapes
do not show a wrong rope theta, norm eps, number of heads, or router. The settings of the live modules are read under
the names that config.json has for them, and compared with the model that transformers makes of that config.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from torch import nn

from shardsmith.errors import UnsupportedFormatError, UsageError
from shardsmith.ground.ranks import Ranks
from shardsmith.hf.blueprint import plain_config, without_weights
from shardsmith.hf.hf_directory import CONFIG_FILE, read_config
from shardsmith.load.faults import LoadFault
from shardsmith.load.live_weights import LiveWeights
from shardsmith.load.source import read_record
from shardsmith.name_maps.maps import NameMap
from shardsmith.tensors.fqn import clean_fqn, matches

from .arithmetic import arithmetic_faults
from .inner import find_held
from .names import TorchTitanNames
from .rope import RopeOfConfig, rope_faults

log = logging.getLogger(__name__)

_EQUAL = 1e-9
_ATTENTION = {
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
}
_ROUTER = {
    "top_k": "num_experts_per_tok",
    "score_func": "scoring_func",
    "route_norm": "norm_topk_prob",
    "route_scale": "routed_scaling_factor",
    "num_expert_groups": "n_group",
    "num_limited_groups": "topk_group",
}
_SCORES = {"deepseek_v3": "sigmoid", "deepseek_v2": "softmax", "qwen3_moe": "softmax"}
"""How the classes of transformers score experts, which their configs do not say."""
_SCORED_FIRST = "score_before_experts"
_BALANCED = "moe_force_load_balance"
"""Settings of TorchTitan alone: what they change, transformers computes in one way."""
_WINDOW, _CAUSAL = "sliding_window", "is_causal"
_TIE = "tie_word_embeddings"
_ENDS = ("tok_embeddings", "output", "lm_head")


@dataclass(frozen=True, slots=True)
class Source:
    """The model that a config of transformers describes.

    Attributes:
        origin: Where the config is from, for people.
        config: The config with every default filled in.
        model: The model of transformers that it makes, without weights.
        rope: How that model turns its queries and keys; None without rotary embeddings.
    """

    origin: str
    config: Mapping[str, Any]
    model: nn.Module
    rope: RopeOfConfig | None

    @classmethod
    def of(cls, config: Mapping[str, Any], origin: str) -> Source:
        """Make the model of a config. No communication.

        Raises:
            UnsupportedFormatError: transformers is not installed, or has no class for it.
        """
        try:
            import transformers

            given = {key: value for key, value in config.items() if key != "model_type"}
            made = transformers.AutoConfig.for_model(str(config["model_type"]), **given)
            with without_weights():
                model = transformers.AutoModelForCausalLM.from_config(made)
        except Exception as error:  # whatever a config that it does not know makes it raise
            raise UnsupportedFormatError(
                origin, f"transformers cannot make this model ({type(error).__name__}: {error})"
            ) from error
        plain = plain_config(made.get_text_config())
        return cls(origin, plain, model, RopeOfConfig.of(model, plain))

    def expected(self, name: str) -> Any:
        """What the config says of a setting, with the defaults that its class computes; None where it says nothing."""
        config = self.config
        if name == "head_dim" and not config.get(name):
            return config["hidden_size"] // config["num_attention_heads"]
        if name == "num_key_value_heads" and config.get(name) is None:
            return config.get("num_attention_heads")
        if name == "scoring_func" and config.get(name) is None:
            return _SCORES.get(str(config.get("model_type")))
        if name in ("n_group", "topk_group", "routed_scaling_factor"):
            return 1 if config.get(name) is None else config[name]
        if name == _SCORED_FIRST:
            return str(config.get("model_type")).startswith("llama4")
        if name == _BALANCED:
            return False
        if name == _WINDOW:
            return config.get(name) or "none"
        if name == _CAUSAL:
            return True
        return config.get(name)

    def has_sizes_of(self, live: LiveWeights) -> bool:
        """Return whether a live model can be this one, as far as its embedding shows."""
        theirs = tuple(self.model.get_input_embeddings().weight.shape)  # type: ignore[operator]  # of transformers
        ours = [spec.shape for name, spec in live.specs.items() if name.endswith(f"{_ENDS[0]}.weight")]
        return all(tuple(shape) == theirs for shape in ours)


def find_source(checkpoint: Path, assets: str | None, live: LiveWeights) -> Source | None:
    """The model of what is loaded: by the record of ``to-dcp``, its own config.json, or that of TorchTitan's assets.

    None where none of these says it. The assets count only if they can be of this model: many runs take just a
    tokenizer from there. No communication.
    """
    record = read_record(checkpoint)
    if record is not None and record.config is not None:
        return _source(record.config, f"{checkpoint.name}/metadata.json")
    if (checkpoint / CONFIG_FILE).is_file():
        return _source(read_config(checkpoint), f"{checkpoint.name}/{CONFIG_FILE}")
    if assets and (Path(assets) / CONFIG_FILE).is_file():
        found = _source(read_config(Path(assets)), f"{assets}/{CONFIG_FILE}")
        return found if found is not None and found.has_sizes_of(live) else None
    return None


def faults_on_all(
    ranks: Ranks, live: LiveWeights, find: Callable[[], Source | None], adapter: Any, allowed: Sequence[str]
) -> tuple[Source | None, list[LoadFault]]:
    """Compare the settings on all ranks: the source, and what differs on any of them. Communicates.

    Args:
        ranks: All ranks of the job.
        live: The live model's tensors.
        find: Called on each rank; its errors reach all.
        adapter: TorchTitan's state-dict adapter; None without one.
        allowed: Patterns of settings that may differ.
    """
    names = TorchTitanNames(adapter, ()) if adapter is not None else None
    sources: list[Source | None] = []

    def compare() -> list[list[str]]:
        sources.append(find())
        found = compare_settings(live, sources[0], names, allowed) if sources[0] is not None else []
        return [[*astuple(fault)] for fault in found]

    parts: list[list[str]] = ranks.agree("comparing the trainer's config", compare, lambda said: [*chain(*said)])
    return sources[0], [LoadFault(*fault) for fault in dict.fromkeys(map(tuple, parts))]


def refuse_other_settings(ranks: Ranks, base: Path, model: nn.Module, adapter: Any, allowed: Sequence[str]) -> None:
    """Raise UsageError if exports with the config of a base model would not compute what trains. Communicates."""
    if find_held(model) is not None:
        return
    live = LiveWeights(model)
    _, faults = faults_on_all(
        ranks, live, lambda: _source(read_config(base), f"{base}/{CONFIG_FILE}"), adapter, allowed
    )
    if faults:
        lines = "\n  ".join(map(str, faults))
        raise UsageError(
            f"checkpoint_hooks: exports with {base}/{CONFIG_FILE} would not compute what this trainer does\n  {lines}\n"
            f"Correct one of the two, or let them differ with allow_config=[{quoted(faults)}]."
        )


def quoted(faults: Sequence[LoadFault]) -> str:
    """Return the settings at fault, as a list of TOML and JSON has them."""
    return ", ".join(f'"{fault.name}"' for fault in faults)


def _source(config: Mapping[str, Any], origin: str) -> Source | None:
    try:
        return Source.of(config, origin)
    except UnsupportedFormatError as error:
        log.warning("%s", error)
        return None


def compare_settings(
    live: LiveWeights, source: Source, names: NameMap | None, allowed: Sequence[str]
) -> list[LoadFault]:
    """Return what a live model computes with, other than its source says. No communication.

    Args:
        live: The live model's tensors.
        source: The model of the config to compare with.
        names: From the model's names to those of transformers; None where nobody knows them.
        allowed: Patterns of settings that may differ, under their names in config.json.
    """
    faults = [*_setting_faults(live, source), *_eps_faults(live, source, names), *_tie_faults(live, source)]
    if source.rope is not None:
        faults += rope_faults(live, source.rope, source.origin)
    faults += arithmetic_faults(live, source.config, source.origin)
    return [fault for fault in faults if not matches(fault.name, allowed)]


def _setting_faults(live: LiveWeights, source: Source) -> list[LoadFault]:
    """Of attention and routers. Each setting once, whatever the number of layers that have it."""
    found: dict[str, tuple[str, Any]] = {}
    for where, module in _modules(live):
        for name, value in _settings_of(module):
            expected = source.expected(name)
            if expected is not None and not _same(value, expected):
                found.setdefault(name, (where, value))
    return [
        LoadFault("config-differs", name, _words(value, where, source.expected(name), source.origin))
        for name, (where, value) in found.items()
    ]


def _settings_of(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The settings of one module under the names of config.json."""
    if hasattr(module, "score_func"):
        for own, name in _ROUTER.items():
            value = getattr(module, own, None)
            yield name, 1 if value is None and name in ("n_group", "topk_group") else value
        yield _BALANCED, getattr(module, "_debug_force_load_balance", False)
    elif isinstance(getattr(module, "top_k", None), int):  # what hands the tokens of a router to its experts
        yield _ROUTER["top_k"], module.top_k
    elif isinstance(first := getattr(module, _SCORED_FIRST, None), bool):
        yield _SCORED_FIRST, first
    elif hasattr(module, "n_heads") and hasattr(module, "inner_attention"):
        for own, name in _ATTENTION.items():
            if (value := getattr(module, own, None)) is not None:
                yield name, value
    yield from _windows_of(module)


def _windows_of(module: Any) -> Iterator[tuple[str, Any]]:
    """Which tokens attention sees, where the module says it. Layers that see all are compared by their arithmetic."""
    window = getattr(module, "window_size", None)
    if isinstance(window, tuple):  # VarlenAttention of 0.3: how many tokens to the left and to the right; -1 is all
        yield _CAUSAL, window[1] == 0
        if window[0] >= 0:
            yield _WINDOW, window[0] + 1
    # GPT-OSS, from whose config the masks are made: 0.2 has one for all, 0.3 one for each layer.
    layers = getattr(getattr(module, "config", None), "layers", None) or ()
    for holder in (getattr(module, "model_args", None), *(getattr(layer, "attention", None) for layer in layers)):
        if isinstance(size := getattr(holder, "sliding_window_size", None), int):
            yield _WINDOW, size


def _eps_faults(live: LiveWeights, source: Source, names: NameMap | None) -> list[LoadFault]:
    """Of norms. Some classes of transformers have one in some norms that their config does not say."""
    stated = next(
        (v for k in ("rms_norm_eps", "layer_norm_eps", "norm_eps") if (v := source.config.get(k)) is not None), None
    )
    if stated is None:
        return []
    twins = _twin_eps(live, source, names)
    found = {
        where: module.eps
        for where, module in _modules(live)
        # without an eps it is torch's: 0.2 makes DeepSeek's last norm so, and no setting of the trainer changes that
        if isinstance(module, nn.RMSNorm | nn.LayerNorm)
        and module.eps is not None
        and not any(_same(module.eps, right) for right in (stated, twins.get(f"{where}.weight", stated)))
    }
    if not found:
        return []
    first, eps = next(iter(found.items()))
    more = f" and {len(found) - 1} other norms" if len(found) > 1 else ""
    return [LoadFault("norm-eps-differs", "rms_norm_eps", _words(eps, first + more, stated, source.origin))]


def _twin_eps(live: LiveWeights, source: Source, names: NameMap | None) -> dict[str, float]:
    """Name of a norm's weight -> the eps of that norm in the model of transformers."""
    vectors = {name: spec for name, spec in live.specs.items() if len(spec.shape) == 1}
    try:
        targets = names.targets(vectors) if names is not None else {}
    except UnsupportedFormatError:
        return {}
    found: dict[str, float] = {}
    for theirs, target in targets.items():
        with_eps: Any = dict(source.model.named_modules()).get(theirs.rpartition(".")[0])
        eps = getattr(with_eps, "variance_epsilon", getattr(with_eps, "eps", None))
        if isinstance(eps, float):
            found |= dict.fromkeys(target.sources, eps)
    return found


def _tie_faults(live: LiveWeights, source: Source) -> list[LoadFault]:
    """Whether the head is the embedding. A part of a pipeline has one of them at most."""
    ends = [name for name in live.specs if name.split(".")[-2:-1] and name.split(".")[-2] in _ENDS]
    expected = source.config.get(_TIE)
    if len(ends) < 2 or expected is None:
        return []
    tied = any(name in live.tied for name in ends)
    if tied == bool(expected):
        return []
    return [LoadFault("config-differs", _TIE, _words(tied, " and ".join(ends), expected, source.origin))]


def _modules(live: LiveWeights) -> Iterator[tuple[str, Any]]:
    for part in live.parts:
        for name, module in part.named_modules():
            yield clean_fqn(name, part), module
            # 0.3's hands the tokens to experts, and is no module.
            if (dispatcher := getattr(module, "token_dispatcher", None)) is not None:
                yield f"{clean_fqn(name, part)}.token_dispatcher", dispatcher


def _same(found: Any, expected: Any) -> bool:
    if None not in (found, expected) and (isinstance(found, float) or isinstance(expected, float)):
        return abs(float(found) - float(expected)) <= _EQUAL * max(abs(float(found)), abs(float(expected)))
    return bool(found == expected)


def _words(found: Any, where: str, expected: Any, origin: str) -> str:
    return f"{found} in the trainer ({where}), {expected} in {origin}"
