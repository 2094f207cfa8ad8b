"""What the loss at the start of training would be under each cause that lies in a trainer, and which one it is.

No checkpoint shows these. But the model is at hand, and so may be the trainer's first batch and the loss that it
reported for it: what gives just that loss is what the trainer does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from shardsmith.diagnose.batches import IGNORED, Batch
from shardsmith.diagnose.findings import Finding, one
from shardsmith.diagnose.live_model import LiveModel

RIGHT = "as it should be"
_ABSOLUTE, _RELATIVE = 0.01, 0.003
_USUAL_THETA = 10_000.0


@dataclass(frozen=True, slots=True)
class Cause:
    """A cause, and the loss that it gives."""

    text: str
    code: str | None
    """None for what is right."""
    loss: float


def cross_entropy(logits: Tensor, labels: Tensor, shift: int = 1) -> float:
    """Mean over the tokens, each predicted from what stands ``shift`` places before it.

    Args:
        logits: [B, T, V].
        labels: [B, T], unshifted; -100 is left out.
    """
    flat, wanted = logits[:, :-shift].flatten(0, 1), labels[:, shift:].flatten()
    return float(torch.nn.functional.cross_entropy(flat.float(), wanted, ignore_index=IGNORED))


def divergence(expected: Tensor, found: Tensor) -> tuple[float, float]:
    """Mean and largest Kullback-Leibler divergence a token, in nats, of two sets of logits [B, T, V]."""
    p, q = expected.log_softmax(-1), found.log_softmax(-1)
    each = (p.exp() * (p - q)).sum(-1)
    return float(each.mean()), float(each.max())


def possible_causes(model: LiveModel, batch: Batch) -> Iterator[Cause]:
    """Every cause that can be tried out on this model and batch, what is right first."""
    logits = model.logits(batch)
    right = cross_entropy(logits, batch.labels)
    yield Cause(RIGHT, None, right)
    yield Cause("labels shifted twice", "labels-shifted-twice", cross_entropy(logits, batch.labels, shift=2))
    yield from _buffer_causes(model, batch)
    if batch.positions is not None:
        packed = cross_entropy(model.plain_logits(batch.tokens), batch.labels)
        yield Cause("positions and attention run on over document borders", "positions-not-reset", packed)
    extra = model.auxiliary_loss(batch)
    if extra is not None:
        yield Cause("the auxiliary loss of the experts is added", "auxiliary-loss-included", right + extra)
    yield Cause("nothing was loaded: the loss of a random model", "nothing-loaded", math.log(logits.shape[-1]))


def explain(causes: list[Cause], reported: float, batch: Batch) -> Iterator[Finding]:
    """The cause that gives the reported loss; nothing where what is right gives it.

    On a batch that is not the trainer's only a random model can be told, whose loss is the same on every batch.
    """
    right = causes[0]
    fitting = sorted(
        (cause for cause in causes if _fits(cause, reported)), key=lambda cause: abs(cause.loss - reported)
    )
    if not batch.given:
        fitting = [cause for cause in fitting if cause.code == "nothing-loaded" and right.loss < 0.8 * cause.loss]
    if right in fitting:
        return
    expected = f"{right.loss:.4f} on {batch.origin}"
    if fitting and fitting[0].code:
        text = f"{reported:.4f}, which is what this gives: {fitting[0].text} ({fitting[0].loss:.4f})"
        yield one(fitting[0].code, ["the trainer"], expected, text)
    elif batch.given:
        yield one("start-loss-unexplained", ["the trainer"], expected, f"{reported:.4f}")


def _fits(cause: Cause, reported: float) -> bool:
    # A random model is not exactly uniform: its loss lies a little above ln V.
    relative = 0.05 if cause.code == "nothing-loaded" else _RELATIVE
    return abs(cause.loss - reported) <= _ABSOLUTE + relative * reported


def _buffer_causes(model: LiveModel, batch: Batch) -> Iterator[Cause]:
    buffers = {name: buffer for name, buffer in model.buffers().items() if buffer.is_floating_point()}
    if not buffers:
        return
    zeros = {name: torch.zeros_like(buffer) for name, buffer in buffers.items()}
    with model.with_buffers(zeros):
        loss = cross_entropy(model.logits(batch), batch.labels)
    yield Cause("non-persistent buffers are zero", "buffer-zero", loss)
    usual = {name: _inverse_frequencies(buffer) for name, buffer in buffers.items() if name.endswith("inv_freq")}
    if usual and any(not torch.allclose(usual[name], buffers[name]) for name in usual):
        with model.with_buffers(usual):
            loss = cross_entropy(model.logits(batch), batch.labels)
        yield Cause(f"rope_theta {_USUAL_THETA:.0f}, the usual default", "rope-differs", loss)


def _inverse_frequencies(buffer: Tensor) -> Tensor:
    count = buffer.numel()
    return (_USUAL_THETA ** -(torch.arange(count) / count)).reshape(buffer.shape)
