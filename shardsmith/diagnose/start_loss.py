"""What the loss at the start of training would be under each cause that lies in a trainer, and which one it is.

No checkpoint shows these. But the model is at hand, and so may be the trainer's first batch and the loss that it
reported for it: what gives just that loss is what the trainer does.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shardsmith.compare.findings import Finding, one
from shardsmith.diagnose.batches import IGNORED, Batch
from shardsmith.diagnose.live_model import LiveModel

RIGHT = "as it should be"
# How near to what is right a loss is no finding, and how near to a cause it must be for that to be named. bfloat16
# moves the loss of a batch by up to 0.25 %; among so many causes one is within 1 % of any number.
_ABSOLUTE, _RELATIVE = 0.01, 0.003
_NAMED_ABSOLUTE, _NAMED_RELATIVE = 0.002, 0.001
_CLEARLY = 3
"""How many times nearer than any other a cause must be to be named."""
_INDISTINCT = 1e-3
"""Losses that are no further apart are one: of such causes none can be told from the other."""
_USUAL_THETA = 10_000.0
_ACCUMULATIONS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 64, 128, 256)


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
        shift: Number of positions between input and label; 1 in a causal model.
    """
    flat, wanted = logits[:, : logits.shape[1] - shift].flatten(0, 1), labels[:, shift:].flatten()
    return float(torch.nn.functional.cross_entropy(flat.float(), wanted, ignore_index=IGNORED))


def divergence(expected: Tensor, found: Tensor) -> tuple[float, float]:
    """Mean and largest Kullback-Leibler divergence a token, in nats, of two sets of logits [B, T, V]."""
    p, q = expected.log_softmax(-1), found.log_softmax(-1)
    each = (p.exp() * (p - q)).sum(-1)
    return float(each.mean()), float(each.max())


def possible_causes(
    model: LiveModel, batch: Batch, padding: Collection[int] = (), borders: Collection[int] = ()
) -> Iterator[Cause]:
    """Every cause that can be tried out on this model and batch, what is right first.

    Args:
        model: The model with the right weights.
        batch: The batch to try it on.
        padding: Ids of tokens that only fill up.
        borders: Ids of tokens that begin or end a text. Where one of them fills up, too, and neither labels nor a mask
            say which one is which, both ways to see it are right.
    """
    logits = model.logits(batch)
    labels = without_padding(batch, padding, borders)
    right = cross_entropy(logits, labels)
    yield Cause(RIGHT, None, right)
    yield from _loss_causes(logits, labels)
    if not batch.labelled and not torch.equal(less := without_padding(batch, padding), labels):
        note = ", with no loss of the padding token beside the text"
        yield Cause(RIGHT + note, None, cross_entropy(logits, less))
        yield from (replace(cause, text=cause.text + note) for cause in _loss_causes(logits, less))
    filled = batch.padding(padding, borders)
    text = batch.tokens.masked_fill(filled, IGNORED)
    yield from _label_causes(logits, batch, labels, text)
    if batch.positions is None and bool(filled.any()):  # what stands in for padding depends on what it sees
        mask, note = ((~filled).long(), "with a mask") if batch.mask is None else (None, "without the mask")
        otherwise = model.logits(replace(batch, mask=mask))
        loss = cross_entropy(otherwise, labels)
        if batch.mask is None:  # a trainer may make one of its own
            yield Cause(f"{RIGHT}, with a mask of the padding", None, loss)
        else:
            yield Cause("the model does not see the attention mask of the batch", "attention-mask-ignored", loss)
        others = _label_causes(otherwise, batch, labels, text)
        yield from (replace(cause, text=f"{cause.text} ({note})") for cause in others)
    yield from _buffer_causes(model, batch, labels)
    if batch.positions is not None:
        packed = cross_entropy(model.plain_logits(batch.tokens), labels)
        yield Cause("positions and attention run on over document borders", "positions-not-reset", packed)
    extra = model.auxiliary_loss(batch)
    if extra is not None:
        yield Cause("the auxiliary loss of the experts is added", "auxiliary-loss-included", right + extra)
    yield Cause("nothing was loaded: the loss of a random model", "nothing-loaded", math.log(logits.shape[-1]))


def without_padding(batch: Batch, padding: Collection[int], borders: Collection[int] = ()) -> Tensor:
    """Return the labels that no loss is taken of padding with: what a trainer should give."""
    return batch.labels.masked_fill(batch.padding(padding, borders), IGNORED)


def labelled_padding(
    model: LiveModel, batch: Batch, padding: Collection[int], borders: Collection[int]
) -> Iterator[Finding]:
    """Whether the trainer's labels have padding where they should have -100."""
    right = without_padding(batch, padding, borders)
    count = int((right != batch.labels).sum())
    if count:
        logits = model.logits(batch)
        losses = [cross_entropy(logits, labels) for labels in (right, batch.labels)]
        found = f"{count} labels of padding, and with them a loss of {losses[1]:.4f}"
        yield one("padding-in-labels", [batch.origin], f"-100, and a loss of {losses[0]:.4f}", found)


def explain(causes: list[Cause], reported: float, batch: Batch) -> Iterator[Finding]:
    """The cause that gives the reported loss; nothing where what is right gives it.

    A cause is named if it is clearly nearer than what is right and than every other one. On a batch that is not the
    trainer's only a random model can be told, whose loss is the same on every batch.
    """
    right = causes[0]
    if any(_fits(cause, reported) for cause in causes if cause.code is None):
        return
    random = [cause for cause in causes if cause.code == "nothing-loaded"]
    if not batch.given:
        causes = [cause for cause in random if right.loss < 0.8 * cause.loss]
    fitting = sorted((c for c in causes if _fits(c, reported)), key=lambda cause: abs(cause.loss - reported))
    close = [cause for cause in fitting if cause not in random and _is_close(cause, reported)]
    expected = f"{right.loss:.4f} on {batch.origin}"
    best = next(iter(close or [cause for cause in fitting if cause in random]), None)
    if best is not None and best.code == "padding-in-labels" and batch.labelled:
        return  # that is said of the batch itself
    if best is not None and best.code and _stands_out(best, causes, reported):
        text = f"{reported:.4f}, which is what this gives: {best.text} ({best.loss:.4f})"
        yield one(best.code, ["the trainer"], expected, text)
    elif batch.given:
        near = "; ".join(f"{cause.text} ({cause.loss:.4f})" for cause in fitting)
        yield one("start-loss-unexplained", ["the trainer"], expected, f"{reported:.4f}{near and f', near to {near}'}")


def _stands_out(best: Cause, causes: list[Cause], reported: float) -> bool:
    """Whether no other cause comes near, and the loss of what is right least of all."""
    apart = abs(best.loss - reported)
    others = (abs(cause.loss - reported) for cause in causes if cause.code not in (best.code, "nothing-loaded"))
    return best.code == "nothing-loaded" or all(other > _CLEARLY * apart + _INDISTINCT for other in others)


def _fits(cause: Cause, reported: float) -> bool:
    # A random model is not exactly uniform: its loss lies a little above ln V.
    relative = 0.05 if cause.code == "nothing-loaded" and reported > cause.loss else _RELATIVE
    return abs(cause.loss - reported) <= _ABSOLUTE + relative * reported


def _is_close(cause: Cause, reported: float) -> bool:
    return abs(cause.loss - reported) <= _NAMED_ABSOLUTE + _NAMED_RELATIVE * reported


def _label_causes(logits: Tensor, batch: Batch, labels: Tensor, text: Tensor) -> Iterator[Cause]:
    """Loss where none should be taken: of padding, and of what is masked, such as a prompt."""
    if not torch.equal(labels, batch.labels):
        loss = cross_entropy(logits, batch.labels)
        yield Cause("labels hold the padding token, not -100", "padding-in-labels", loss)
    if torch.equal(text, batch.labels):  # nothing but padding is masked
        kinds = [(batch.tokens, "padding")]
    elif torch.equal(text, batch.tokens):  # nothing says which tokens are padding
        kinds = [(batch.tokens, "masked tokens")]
    else:
        kinds = [(batch.tokens, "masked tokens and padding"), (text, "masked tokens")]
    if bool((batch.labels == IGNORED)[:, 1:].any()):
        for kept, which in kinds:
            yield Cause(f"the loss is taken of {which}, too", "loss-unmasked", cross_entropy(logits, kept))


def _loss_causes(logits: Tensor, labels: Tensor) -> Iterator[Cause]:
    """Labels at other places, and other ways to make one number of the losses of many tokens."""
    right = cross_entropy(logits, labels)
    yield Cause("labels shifted twice", "labels-shifted-twice", cross_entropy(logits, labels, shift=2))
    yield Cause("labels not shifted", "labels-not-shifted", cross_entropy(logits, labels, shift=0))
    counts = [int((row[1:] != IGNORED).sum()) for row in labels]
    rows = [cross_entropy(logits[i : i + 1], labels[i : i + 1]) for i in range(len(labels)) if counts[i]]
    if len(rows) > 1 and len(set(filter(None, counts))) > 1:
        yield Cause("the mean of the means of rows", "mean-of-rows", sum(rows) / len(rows))
    yield Cause("the sum over all tokens", "loss-summed", right * sum(counts))
    if len(rows) > 1:
        yield Cause("the sum over the tokens of each row", "loss-summed", right * sum(counts) / len(rows))
        yield Cause("the sum of the means of rows", "loss-summed", sum(rows))
    for steps in _ACCUMULATIONS:
        yield Cause(f"the loss times {steps}, as if summed over that many steps", "loss-scaled", right * steps)
        yield Cause(f"the loss divided by {steps}, as by accumulation steps", "loss-scaled", right / steps)


def _buffer_causes(model: LiveModel, batch: Batch, labels: Tensor) -> Iterator[Cause]:
    buffers = {name: buffer for name, buffer in model.buffers().items() if buffer.is_floating_point()}
    if not buffers:
        return
    zeros = {name: torch.zeros_like(buffer) for name, buffer in buffers.items()}
    with model.with_buffers(zeros):
        loss = cross_entropy(model.logits(batch), labels)
    yield Cause("non-persistent buffers are zero", "buffer-zero", loss)
    usual = {name: _inverse_frequencies(buffer) for name, buffer in buffers.items() if name.endswith("inv_freq")}
    if usual and any(not torch.allclose(usual[name], buffers[name]) for name in usual):
        with model.with_buffers(usual):
            loss = cross_entropy(model.logits(batch), labels)
        yield Cause(f"rope_theta {_USUAL_THETA:.0f}, the usual default", "rope-differs", loss)


def _inverse_frequencies(buffer: Tensor) -> Tensor:
    count = buffer.numel()
    return (_USUAL_THETA ** -(torch.arange(count, device="cpu") / count)).reshape(buffer.shape)
