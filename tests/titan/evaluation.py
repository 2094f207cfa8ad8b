"""The loss of one fixed batch: by TorchTitan's live model, in the middle of a job, and by transformers."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from shardsmith.integrations.torchtitan.answers import TitanAnswers
from tests.titan.cpu import checkpoint

TOKENS = (torch.arange(2 * 33).view(2, 33) * 37 + 11) % 2000
FLOAT32 = ["--training.mixed_precision_param=float32"]
FILE = "losses.json"


@contextlib.contextmanager
def evaluated(step: int) -> Iterator[None]:
    """Within it, TorchTitan's model is evaluated when a step is over, and with its average in its place if it has one.

    Writes FILE into the dump folder. Step 0 is after the load.
    """
    manager: Any = checkpoint.CheckpointManager
    load, save = manager.load, manager.save

    def load_and_evaluate(self: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = load(self, *args, **kwargs)
        if step == 0:
            _write(self)
        return loaded

    def save_and_evaluate(self: Any, curr_step: int, *args: Any, **kwargs: Any) -> Any:
        saved = save(self, curr_step, *args, **kwargs)
        if curr_step == step:
            _write(self)
        return saved

    manager.load, manager.save = load_and_evaluate, save_and_evaluate
    try:
        yield
    finally:
        manager.load, manager.save = load, save


def losses_of(run: Path) -> dict[str, float]:
    """What ``evaluated`` found."""
    found: dict[str, float] = json.loads((run / FILE).read_text())
    return found


def transformers_loss(directory: Path, unused: str | None = None) -> float:
    """Of the model that ``from_pretrained`` makes of a directory, in which nothing may be missing or left over.

    But for tensors whose names begin with ``unused``, which transformers has no place for.
    """
    model, report = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    left_over = [name for name in report.pop("unexpected_keys") if unused is None or not name.startswith(unused)]
    assert not any([left_over, *report.values()]), (left_over, report)
    with torch.no_grad():
        return _loss(model(TOKENS[:, :-1]).logits)


def _write(manager: Any) -> None:
    (model,) = manager.states["model"].model
    losses = {"main": _titan_loss(model)}
    attached = getattr(manager, "_attached", None)
    if attached is not None and attached.ema is not None:
        with attached.ema.swapped_in():
            losses["ema"] = _titan_loss(model)
    if dist.get_rank() == 0:
        folder = Path(manager.folder).parent
        (folder / FILE).write_text(json.dumps(losses))


def _titan_loss(model: nn.Module) -> float:
    kept = [buffer.clone() for buffer in model.buffers()]  # experts count their tokens, which moves the bias of routers
    with torch.no_grad():
        logits = TitanAnswers(model)(input_ids=TOKENS[:, :-1])  # a call with masks, and with the head of the loss
        for buffer, value in zip(model.buffers(), kept, strict=True):
            buffer.copy_(value)
        return _loss(logits.full_tensor() if isinstance(logits, DTensor) else logits)  # tensor parallel cuts them up


def _loss(logits: Tensor) -> float:
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), TOKENS[:, 1:].flatten()).item()
