"""What a model is asked to see how it answers: a text where it predicts tokens, else whatever its class takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from shardsmith.diagnose.batches import Batch, check_batch, fixed_batch, read_batch
from shardsmith.diagnose.live_model import LiveModel
from shardsmith.errors import UsageError
from shardsmith.export.probe_images import takes_images
from shardsmith.export.probe_inputs import longest_text, made_up_image, made_up_inputs, made_up_tokens


@dataclass(frozen=True, slots=True)
class Probe:
    """One question, the same for every model of a kind."""

    origin: str
    """What it is, for people."""
    batch: Batch | None
    """The tokens, where the model predicts tokens."""
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    """The arguments of its forward where it does not."""

    @classmethod
    def for_model(cls, model: LiveModel, directory: Path, given: Path | None = None) -> Probe:
        """Return what to ask a model.

        Args:
            model: The model to ask.
            directory: Of the model, with its tokenizer.
            given: A file with the trainer's own batch.

        Raises:
            CheckpointError: the file cannot be read, or is no batch of such a model.
            UsageError: nothing is known that such a model takes.
        """
        if not model.predicts_tokens:
            inputs = made_up_inputs(model.module)
            return cls(f"made-up {', '.join(inputs)}", None, inputs)
        config = model.module.config
        rows, longest = model.vocabulary, longest_text(config)
        if given is not None:
            batch = read_batch(given)
            check_batch(batch, rows, longest, given)
        else:
            batch = fixed_batch(directory, rows, longest, lambda length: made_up_tokens(config, length, rows))
        return cls(batch.origin, batch)

    @classmethod
    def of_image(cls, model: LiveModel) -> Probe | None:
        """Return an image with a text, for a model that is asked for tokens and takes images, too.

        None for any other, and where it takes images in a way that is not known: ``with_image`` says so.
        """
        if not model.predicts_tokens or not takes_images(model.module):
            return None
        try:
            return cls("a made-up image with a text", None, made_up_image(model.module))
        except UsageError:
            return None

    def with_image(self, image: Probe | None, model: LiveModel) -> str:
        """Return what a model was asked altogether, for people."""
        if image is not None:
            return f"{self.origin} and {image.origin}"
        alone = self.batch is not None and takes_images(model.module)
        return f"{self.origin} alone (how it takes an image is not known)" if alone else self.origin

    def ask(self, model: LiveModel) -> Tensor:
        """Return what a model answers, in float32: [B, T, V] where it predicts tokens."""
        return model.logits(self.batch) if self.batch is not None else model.answer(self.inputs)
