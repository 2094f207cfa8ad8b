"""TorchTitan's state-dict adapters, asked for every tensor of a model: for tied ones, and for those that they lack.

Some adapters have no name for weights of their own model, or names that no class of transformers has. The names that
transformers has for these are the rules below; they stand beside what the adapter says of the rest.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Translate = Callable[[dict[str, Tensor]], Mapping[str, Any]]

_TIES = ("enable_weight_tying", "tie_word_embeddings")
_LAYER = r"layers\.(\d+)\."
_EXPERTS = _LAYER + r"moe\.(?:routed_experts\.inner_experts|experts)\."  # 0.3, 0.2


@dataclass(frozen=True, slots=True)
class Rule:
    """What tensors of one kind are in the files of a class of transformers."""

    pattern: str
    """Of the name in TorchTitan, whole; the group is the number of the layer."""
    name: str
    """In the files, with ``{}`` for that number."""
    transposed: bool = False
    """Whether the last two dimensions are exchanged in the files."""


_RULES = {
    "GptOssStateDictAdapter": (  # its own names are those of MXFP4 blocks, which TorchTitan does not write
        Rule(_EXPERTS + "mlp1_weight(?:_EGD)?", "model.layers.{}.mlp.experts.gate_up_proj", transposed=True),
        Rule(_EXPERTS + "mlp1_bias(?:_EG)?", "model.layers.{}.mlp.experts.gate_up_proj_bias"),
        Rule(_EXPERTS + "mlp2_weight(?:_EDF)?", "model.layers.{}.mlp.experts.down_proj", transposed=True),
        Rule(_EXPERTS + "mlp2_bias(?:_ED)?", "model.layers.{}.mlp.experts.down_proj_bias"),
    ),
    "Llama4StateDictAdapter": (
        Rule(_LAYER + r"feed_forward\.w1\.weight", "language_model.model.layers.{}.feed_forward.gate_proj.weight"),
        Rule(_LAYER + r"feed_forward\.w2\.weight", "language_model.model.layers.{}.feed_forward.down_proj.weight"),
        Rule(_LAYER + r"feed_forward\.w3\.weight", "language_model.model.layers.{}.feed_forward.up_proj.weight"),
    ),
}
"""By the name of the adapter's class."""
_WITHIN = "language_model."
"""How Llama 4 that sees calls the language model in it; the text model alone has no such name."""
_TEXT_ALONE = {"llama4_text"}


def complete_translation(adapter: Any, config: Mapping[str, Any] | None) -> Translate:
    """Return what an adapter makes of tensors, and what its rules add, under the names of the class of ``config``.

    Changes nothing of the adapter.

    Args:
        adapter: TorchTitan's state-dict adapter.
        config: config.json of the exported model; None where it is not known.
    """
    to_hf = own_translation(adapter)
    rules = _RULES.get(type(adapter).__name__, ())
    is_text_alone = str((config or {}).get("model_type")) in _TEXT_ALONE

    def translate(tensors: dict[str, Tensor]) -> Mapping[str, Any]:
        added = {name: made for name, value in tensors.items() if (made := _apply(rules, name, value)) is not None}
        rest = {name: value for name, value in tensors.items() if name not in added}
        found = {**to_hf(rest), **dict(added.values())}
        return {name.removeprefix(_WITHIN): value for name, value in found.items()} if is_text_alone else found

    return translate


def own_translation(adapter: Any) -> Translate:
    """Return what an adapter makes of tensors, tied ones too. Which of them are written is decided as for any model."""
    # The trainer goes on using the adapter itself.
    adapter = copy.copy(adapter)
    for name in ("model_config", "model_args"):
        config = getattr(adapter, name, None)
        if any(getattr(config, tie, False) for tie in _TIES):
            # The config is the trainer's, too.
            config = copy.deepcopy(config)
            for tie in _TIES:
                if hasattr(config, tie):
                    setattr(config, tie, False)
            setattr(adapter, name, config)
    if getattr(adapter, "_tie_word_embeddings", False):
        adapter._tie_word_embeddings = False
    translate: Translate = adapter.to_hf
    return translate


def _apply(rules: tuple[Rule, ...], name: str, value: Tensor) -> tuple[str, Tensor] | None:
    for rule in rules:
        if (match := re.fullmatch(rule.pattern, name)) is not None:
            return rule.name.format(match[1]), value.transpose(-1, -2) if rule.transposed else value
    return None
