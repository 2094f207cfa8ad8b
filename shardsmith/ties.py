"""Tied weights of a checkpoint that does not say what is tied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardsmith.digest import digest_tensor
from shardsmith.export.hf_directory import ties_word_embeddings
from shardsmith.tensors import TensorSource, TensorSpec, read_tensor


def tied_by_config(source: TensorSource, config: dict[str, Any], template: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Output embeddings that the config calls tied and that do equal the input embeddings: alias -> kept name.

    Reads only the candidates: matrices of the shape of an ``embed_tokens``-like weight that the base model's weights,
    where it has any, do not list.

    Args:
        template: The base model's tensors by name; empty if unknown.
    """
    if not ties_word_embeddings(config):
        return {}
    heads = [
        name for name in source.specs if name.endswith(("lm_head.weight", "embed_out.weight")) and name not in template
    ]
    aliases = {}
    for head in heads:
        spec = source.specs[head]
        twins = [
            name
            for name, other in source.specs.items()
            if name != head and (other.shape, other.dtype) == (spec.shape, spec.dtype) and "embed" in name
        ]
        digest = digest_tensor(read_tensor(source, head)) if twins else None
        kept = next((name for name in twins if digest_tensor(read_tensor(source, name)) == digest), None)
        if kept is not None:
            aliases[head] = kept
    return aliases
