"""What a live model of TorchTitan answers to tokens, for exports that are verified by loading them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from shardsmith.errors import UsageError

_WITH_MASKS = ("FlexAttention", "VarlenAttention", "FlexAttentionWrapper", "VarlenAttentionWrapper")
"""Classes of TorchTitan's, 0.3 and 0.2, whose models are handed their masks."""
_SHAPE = (2, 16)
"""Of the batch: sequences, and tokens in each."""


def made_up_tokens(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """A small batch for the model of a config.json, the same on every rank. Raises UsageError without a vocabulary."""
    size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    if not isinstance(size, int):
        raise UsageError('checkpoint_hooks: export_verify="load" needs the vocab_size of config.json')
    count = _SHAPE[0] * _SHAPE[1]
    return {"input_ids": (torch.arange(count, device="cpu").view(_SHAPE) * 37 + 11) % size}


class TitanAnswers:
    """Asks a model of TorchTitan what the exported one will be asked with ``input_ids``."""

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model

    def __call__(self, *, input_ids: Tensor) -> Any:
        """The logits. All ranks; communicates as a forward does."""
        with self._with_head():
            return self._model(input_ids, **self._masks(input_ids))

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
