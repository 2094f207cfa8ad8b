"""Are two checkpoints the same model, by what they answer to a fixed text? Needs memory for two models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from shardsmith.compare.alignment import aligned_source
from shardsmith.compare.effective import config_of
from shardsmith.compare.modules import is_huggingface
from shardsmith.compare.quantized import require_plain
from shardsmith.compare.verification import OpenedPair, VerifyOptions, settings_of
from shardsmith.diagnose.live_model import LiveModel
from shardsmith.diagnose.probe import Probe
from shardsmith.diagnose.start_loss import cross_entropy, divergence
from shardsmith.diagnose.subject import Reference
from shardsmith.errors import UsageError
from shardsmith.export.load_check import apart
from shardsmith.formats.opened import OpenedCheckpoint


@dataclass(frozen=True, slots=True)
class LogitsVerification:
    """How far apart the answers of two checkpoints are."""

    model: str
    batch: str
    largest: float
    """The largest absolute difference of two logits."""
    divergence: float | None
    """The largest Kullback-Leibler divergence a token, in nats; None for a model that predicts no tokens."""
    losses: tuple[float, float] | None
    """Of both, on the text; None for a model that predicts no tokens."""
    tolerance: float

    @property
    def same(self) -> bool:
        """Whether the logits are, but for the tolerance."""
        return self.largest <= self.tolerance


def verify_logits(
    left: Path,
    right: Path,
    model: str,
    options: VerifyOptions,
    base: Path | None = None,
    *,
    trust_remote_code: bool = False,
) -> LogitsVerification:
    """Run both on a fixed text, and on an image with a text where the model takes images.

    Args:
        left: The one checkpoint.
        right: The other checkpoint.
        model: ``"main"`` or ``"ema"``.
        options: The tolerance is of logits; the names are those of a side that is no Hugging Face directory.
        base: A Hugging Face directory of that kind of model; None: whichever of the two is one.
        trust_remote_code: Let transformers run the directory's own Python files.

    Raises:
        UsageError: there is none.
        CheckpointError: one cannot be read, or transformers cannot run it.
    """
    pair = OpenedPair(left, right, options.names)
    try:
        # A base that was given counts; else the side that says what model it is, B first.
        base = base or pair.base
        if base is None:
            raise UsageError("neither is a Hugging Face directory: give one of the same kind of model as --model")
        pair.common([model])
        reference = Reference.open(base)
        # Made once: each side only fills its weights into a second model, made by its own config if it has one.
        made = LiveModel.of_directory(base, trust_remote_code=trust_remote_code)
        probe, image = Probe.for_model(made, base), Probe.of_image(made)
        answers: list[list[Tensor]] = []
        for side in (pair.left, pair.right):
            how = (base, _names(side, options.names), options.rules)
            source, _ = aligned_source(side.models[model], reference.specs, *how)
            require_plain(source, reference.specs, base)
            # The model's own tensors only: a head of the trainer's has no place in its class.
            loaded = [name for name in source.specs if name in reference.specs]
            filled = made.with_weights(source, loaded, _config_of(side, made, trust_remote_code))
            answers.append([one.ask(filled) for one in (probe, image) if one is not None])
        largest = max(float(apart(one, other).abs().max()) for one, other in zip(*answers, strict=True))
        asked = probe.with_image(image, made)
        if (batch := probe.batch) is None:
            return LogitsVerification(model, asked, largest, None, None, options.tolerance)
        texts = (answers[0][0], answers[1][0])
        losses = (cross_entropy(texts[0], batch.labels), cross_entropy(texts[1], batch.labels))
        return LogitsVerification(model, asked, largest, divergence(*texts)[1], losses, options.tolerance)
    finally:
        pair.close()


def _config_of(side: OpenedCheckpoint, made: LiveModel, trust_remote_code: bool) -> Any:
    """What a side says of itself; None where it says nothing, or nothing about such a model."""
    if is_huggingface(side):
        return config_of(side.path, trust_remote_code=trust_remote_code)
    own, config = settings_of(side), made.module.config
    is_alike = own is not None and own.config.get("model_type") == config.model_type
    return config.from_dict(dict(own.config)) if own is not None and is_alike else None


# A Hugging Face directory has its class's names already; the map is for the other side.
def _names(side: OpenedCheckpoint, names: str) -> str:
    return "auto" if is_huggingface(side) else names
