"""Faults that were seen in real runs, each planted into a state dict or into what surrounds it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

State = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Planted:
    """A fault of the weights: names, shapes and counts stay as they are."""

    cause: str
    code: str
    """That ``diagnose`` must find it under, and under no other."""
    plant: Callable[[State], State]
    families: frozenset[str] = frozenset({"olmo2", "llama-tied", "qwen3-moe"})


def random_like(tensor: Tensor) -> Tensor:
    """As a model is initialised: norms are one, everything else small and random."""
    return torch.ones_like(tensor) if tensor.dim() < 2 else torch.randn_like(tensor) * 0.02


def replaced(state: State, part: str, by: Callable[[Tensor], Tensor] = random_like) -> State:
    torch.manual_seed(1)
    return {name: by(tensor) if part in name else tensor for name, tensor in state.items()}


def tied_replaced(state: State) -> State:
    """The embedding, and the head too where it is the same tensor."""
    tied = torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    changed = replaced(state, "embed_tokens")
    return changed | ({"lm_head.weight": changed["model.embed_tokens.weight"]} if tied else {})


def untrained(state: State) -> State:
    """All of it random; what is tied stays tied."""
    changed = replaced(state, "")
    tied = torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    return changed | ({"lm_head.weight": changed["model.embed_tokens.weight"]} if tied else {})


def halves_to_pairs(rows: Tensor, head_dim: int = 16) -> Tensor:
    """From the order of rows that Hugging Face's RoPE wants to that of the complex one."""
    heads = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return heads.transpose(1, 2).reshape(rows.shape)


def permuted(state: State) -> State:
    names = ("q_proj.weight", "k_proj.weight")
    return {name: halves_to_pairs(tensor) if name.endswith(names) else tensor for name, tensor in state.items()}


def shifted(state: State) -> State:
    """The embedding of another numbering of the tokens."""
    tied = torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    names = ["model.embed_tokens.weight", *(["lm_head.weight"] if tied else [])]
    return state | {name: state[name].roll(3, 0) for name in names}


def with_hole(state: State) -> State:
    """One value that is no number."""
    name = "model.layers.1.mlp.down_proj.weight"
    name = name if name in state else "model.layers.1.mlp.experts.down_proj"
    broken = state[name].clone()
    broken.view(-1)[7] = torch.nan
    return state | {name: broken}


def norms(state: State) -> State:
    return replaced(state, "norm", torch.ones_like)


def qk_norms(state: State) -> State:
    return {name: torch.ones_like(t) if "q_norm" in name or "k_norm" in name else t for name, t in state.items()}


def one_element(state: State) -> State:
    name = "model.layers.1.self_attn.o_proj.weight"
    changed = state[name].clone()
    changed[3, 5] += 0.01
    return state | {name: changed}


def layers_swapped(state: State) -> State:
    other = {"layers.0.": "layers.1.", "layers.1.": "layers.0."}
    return {name: state[re.sub(r"layers\.[01]\.", lambda m: other[m[0]], name)] for name in state}


def matrices_swapped(state: State) -> State:
    q, o = (f"model.layers.0.self_attn.{part}.weight" for part in ("q_proj", "o_proj"))
    return state | {q: state[o], o: state[q]}


QK = frozenset({"olmo2", "qwen3-moe"})
UNTIED = frozenset({"olmo2", "qwen3-moe"})
TIED = frozenset({"llama-tied"})

PLANTED = (
    Planted("q/k rows not permuted", "rows-permuted", permuted),
    Planted("lm_head random, tie lost", "tie-broken", lambda state: replaced(state, "lm_head"), TIED),
    Planted("lm_head random", "head-differs", lambda state: replaced(state, "lm_head"), UNTIED),
    Planted("embedding random", "embedding-differs", tied_replaced),
    Planted("vocabulary mapping off", "vocabulary-shifted", shifted),
    Planted("one layer not loaded", "layer-not-loaded", lambda state: replaced(state, "layers.1.")),
    Planted("q/k norms dropped", "qk-norms-dropped", qk_norms, QK),
    Planted("all norms 1", "norms-are-one", norms),
    Planted("no load at all", "nothing-loaded", untrained),
    Planted("one matrix random", "tensor-not-loaded", lambda state: replaced(state, "layers.0.self_attn.o_proj")),
    Planted(
        "one matrix zero", "all-zero-tensor", lambda state: replaced(state, "0.self_attn.o_proj", torch.zeros_like)
    ),
    Planted("one matrix constant", "constant-values", lambda state: replaced(state, "0.self_attn.o_proj", halves)),
    Planted("columns in another order", "values-reordered", lambda state: replaced(state, "0.self_attn.o_proj", mixed)),
    Planted("all scaled", "values-scaled", lambda state: replaced(state, "", scaled)),
    Planted("one matrix scaled", "values-scaled", lambda state: replaced(state, "0.self_attn.o_proj", scaled)),
    Planted("another revision", "values-differ", lambda state: replaced(state, "", slightly_moved)),
    Planted("one element", "values-differ", one_element),
    Planted("two layers swapped", "tensors-swapped", layers_swapped),
    Planted("two matrices of a layer swapped", "tensors-swapped", matrices_swapped),
    Planted("not a number", "not-finite", with_hole),
)


def halves(tensor: Tensor) -> Tensor:
    return torch.full_like(tensor, 0.5)


def mixed(tensor: Tensor) -> Tensor:
    """What a plain reshape makes of a tensor that should have been permuted: the same shape, other values."""
    return tensor.T.reshape(tensor.shape)


def scaled(tensor: Tensor) -> Tensor:
    return tensor * 1.01


def slightly_moved(tensor: Tensor) -> Tensor:
    return tensor + 0.01 * torch.arange(tensor.numel()).reshape(tensor.shape).sin()
