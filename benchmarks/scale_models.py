"""Models too large for this machine, and what each of many ranks holds of them. No tensor is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from shardsmith.run_state.held import Entry
from shardsmith.sharding.holding import Boxes, numbered
from shardsmith.tensors.tensors import Chunk, Shape

COPIES = ("", "optimizer.state.", "optimizer.second.", "ema_model.")
"""The weights, two moments and an average."""
REPLICAS = TENSOR_PARALLEL = 8

Kind = tuple[Shape, int | None]
"""The shape of a tensor, and the dimension that tensor parallelism cuts."""
Model = dict[str, Kind]
"""By name."""


def llama_405b() -> Model:
    """Return the tensors of Llama 3.1 405B."""
    # Hidden size, feed-forward size, keys and values of 8 heads of 128, vocabulary.
    hidden, inner, cached, words = 16384, 53248, 1024, 128256
    model: Model = {
        "tok_embeddings.weight": ((words, hidden), 0),
        "norm.weight": ((hidden,), None),
        "output.weight": ((words, hidden), 0),
    }
    for layer in range(126):
        own: Model = {
            "attention.wq": ((hidden, hidden), 0),
            "attention.wk": ((cached, hidden), 0),
            "attention.wv": ((cached, hidden), 0),
            "attention.wo": ((hidden, hidden), 1),
            "feed_forward.w1": ((inner, hidden), 0),
            "feed_forward.w2": ((hidden, inner), 1),
            "feed_forward.w3": ((inner, hidden), 0),
            "attention_norm": ((hidden,), None),
            "ffn_norm": ((hidden,), None),
        }
        model |= {f"layers.{layer}.{name}.weight": tensor for name, tensor in own.items()}
    return model


def separate_experts() -> Model:
    """Return the tensors of a model of 48 layers with 128 experts, each of three tensors."""
    model: Model = {"embed.weight": ((151936, 2048), 0), "lm_head.weight": ((151936, 2048), 0)}
    for layer in range(48):
        for expert in range(128):
            prefix = f"layers.{layer}.mlp.experts.{expert}"
            model[f"{prefix}.gate_proj.weight"] = (768, 2048), 0
            model[f"{prefix}.up_proj.weight"] = (768, 2048), 0
            model[f"{prefix}.down_proj.weight"] = (2048, 768), 1
    return model


def stacked_experts() -> Model:
    """Return the tensors of the same model with one tensor for all experts of a layer."""
    model: Model = {"embed.weight": ((151936, 2048), 0), "lm_head.weight": ((151936, 2048), 0)}
    for layer in range(48):
        model[f"layers.{layer}.mlp.experts.w1"] = (128, 768, 2048), 1
        model[f"layers.{layer}.mlp.experts.w3"] = (128, 768, 2048), 1
        model[f"layers.{layer}.mlp.experts.w2"] = (128, 2048, 768), 2
    return model


class Spot(NamedTuple):
    """Where a rank is: of the shards of FSDP, and of tensor parallelism."""

    shard: int
    shards: int
    slice: int = 0
    slices: int = 1


LAYOUTS: dict[str, Callable[[int, int], Spot]] = {
    "FSDP": lambda rank, ranks: Spot(rank, ranks),
    "HSDP, 8 replicas": lambda rank, ranks: Spot(rank % (ranks // REPLICAS), ranks // REPLICAS),
    # Neighbouring ranks are slices of one shard, as on the GPUs of a host.
    "TP 8 x FSDP": lambda rank, ranks: Spot(rank // TENSOR_PARALLEL, ranks // TENSOR_PARALLEL, rank % 8, 8),
}
"""What tells from a rank and the number of ranks where it is."""


def boxes_at(shape: Shape, dim: int | None, spot: Spot) -> Boxes:
    """Return what a rank holds of a tensor: the tensor parallel slice along ``dim``, and of that its rows."""
    begin, end = [0] * len(shape), [*shape]
    if dim is not None:
        begin[dim], end[dim] = _cut(0, shape[dim], spot.slice, spot.slices)
    # FSDP cuts the rows of what tensor parallelism has left.
    begin[0], end[0] = _cut(begin[0], end[0], spot.shard, spot.shards)
    sizes = tuple(stop - start for start, stop in zip(begin, end, strict=True))
    return () if 0 in sizes else (Chunk(tuple(begin), sizes),)


def _cut(begin: int, end: int, number: int, parts: int) -> tuple[int, int]:
    # Rounded up: the last parts may be smaller or empty.
    rows = -(-(end - begin) // parts)
    return min(begin + number * rows, end), min(begin + (number + 1) * rows, end)


def entries_at(model: Model, spot: Spot) -> list[Entry]:
    """Return what a rank says that it holds, in all copies."""
    found = []
    for copy in COPIES:
        for name, (shape, dim) in model.items():
            path = tuple(part for part in (copy.split(".", 1)[0], copy.partition(".")[2] + name) if part)
            # ("optimizer", "state.<name>"): one level, and the rest as a flat key.
            found.append(Entry(copy + name, path, shape, torch.float32, boxes_at(shape, dim, spot)))
    return found


def lists_at(kinds: Sequence[Kind], spot: Spot, expected: list[int]) -> list[Boxes]:
    """Return the lists of boxes of a rank, without looking at each of its tensors: ``kinds`` has each kind once.

    Raises:
        RuntimeError: it would not number them as ``expected``, which is by kind of tensor, so that it would be of
            another kind than the rank that was described.
    """
    numbers, lists = numbered((shape, boxes_at(shape, dim, spot)) for shape, dim in kinds)
    if numbers != expected:
        raise RuntimeError(f"ranks are of different kinds: {numbers}, {expected}")
    return lists
