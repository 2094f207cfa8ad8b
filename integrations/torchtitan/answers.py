"""What a live model of TorchTitan answers to tokens, for exports that are verified by loading them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from shardsmith.errors import UsageError

_WITH_MASKS = ("FlexAttention", "VarlenAttention", "FlexAttentionWrapper", "VarlenAttentionWrapper")
"""Classes of TorchTitan's, 0.3 and 0.2, whose models are handed their masks."""
_SEQUENCES, _TOKENS = 2, 16
"""Of the batch; fewer tokens where the model has a rotary table for fewer."""


def made_up_tokens(config: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Return a small batch for the live model, the same on every rank. Raises UsageError without a vocabulary."""
    size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    if not isinstance(size, int):
        raise UsageError('checkpoint_hooks: export_verify="load" needs the vocab_size of config.json')
    shape = (_SEQUENCES, min(_TOKENS, _longest(model)))
    # The factor and the offset spread the tokens over the vocabulary, the same on every rank.
    return {"input_ids": (torch.arange(math.prod(shape), device="cpu").view(shape) * 37 + 11) % size}


def _longest(model: Any) -> int:
    """Tokens of the longest sequence that a model takes: TorchTitan makes its rotary tables for training.seq_len."""
    settings: Any = getattr(model, "model_args", None) or getattr(model, "config", None)  # 0.2, 0.3
    try:
        return int(settings.max_seq_len)
    except (AttributeError, ValueError):  # 0.3 computes it, of models that have such tables
        return _TOKENS


class TitanAnswers:
    """Asks a model of TorchTitan what the exported one will be asked with ``input_ids``."""

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model

    def __call__(self, *, input_ids: Tensor) -> Any:
        """Return the logits. All ranks; communicates as a forward does."""
        with self._with_head():
            answer = self._model(input_ids, **self._masks(input_ids))
        return answer[0] if isinstance(answer, list) else answer  # the others are of layers that predict later tokens

    def _masks(self, tokens: Tensor) -> dict[str, Any]:
        if not any(type(module).__name__ in _WITH_MASKS for module in self._model.modules()):
            return {}
        if hasattr(self._model, "model_args"):  # 0.2, where a token ends a document
            nothing = SimpleNamespace(eos_id=-1)
            return {"attention_masks": self._model.get_attention_masks(input_batch=tokens, tokenizer=nothing)}
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        return {"positions": positions, "attention_masks": self._model.get_attention_masks(positions=positions)}

    @contextlib.contextmanager
    def _with_head(self) -> Iterator[None]:
        """0.3 has its loss apply the head, in pieces."""
        kept = getattr(self._model, "_skip_lm_head", None)
        if kept is None:
            yield
            return
        self._model._skip_lm_head = False
        try:
            yield
        finally:
            self._model._skip_lm_head = kept
