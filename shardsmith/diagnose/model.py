"""What lies beside the weights: config, tokenizer, buffers; and what the model answers with the checkpoint's weights.

Each part is looked at on its own: what one cannot be shown says nothing about the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from shardsmith.compare.values import compare_sources
from shardsmith.conversion.model_directory import hash_tokenizer
from shardsmith.diagnose.batches import Batch, check_ids, fixed_batch, read_batch
from shardsmith.diagnose.buffers import compare_buffers, recorded_buffers, saved_buffers
from shardsmith.diagnose.configs import compare_configs, effective_config
from shardsmith.diagnose.effective import unknown_kind
from shardsmith.diagnose.findings import Finding, Looked, one
from shardsmith.diagnose.live_model import LiveModel
from shardsmith.diagnose.questions import Questions
from shardsmith.diagnose.start_loss import cross_entropy, divergence, explain, possible_causes
from shardsmith.diagnose.subject import Subject
from shardsmith.diagnose.ties import embedding_of
from shardsmith.diagnose.tokenizers import compare_hashes, compare_tokenizers, tokenizer_too_large
from shardsmith.diagnose.training_settings import TrainingSettings
from shardsmith.errors import CheckpointError
from shardsmith.initial.blueprint import describe, model_of_directory
from shardsmith.initial_record import InitialRecord
from shardsmith.model_keys import MAIN
from shardsmith.tensors import TensorSource

_SAME_LOSS = 1e-3
_SAME_LOGITS = 1e-3


def look_at_model(subject: Subject, questions: Questions) -> Looked:
    """Everything that is given, one part after the other."""
    look = _Look(subject, questions)
    for part in (look.settings, look.configs, look.tokenizers, look.buffers, look.live):
        look.take(part)
    return Looked("model", tuple(look.findings), look.facts, tuple(look.unseen), tuple(look.inapplicable))


@dataclass(slots=True)
class _Look:
    """One look at this level, and what it has found so far."""

    subject: Subject
    questions: Questions
    findings: list[Finding] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    unseen: list[str] = field(default_factory=list)
    inapplicable: list[str] = field(default_factory=list)
    training: TrainingSettings | None = None

    def take(self, part: Callable[[], Iterator[Finding]]) -> None:
        """What a part finds; an error ends that part alone."""
        try:
            self.findings.extend(part())
        except CheckpointError as error:
            self.unseen.append(str(error))

    def settings(self) -> Iterator[Finding]:
        """The trainer's."""
        if self.questions.training_config is not None:
            self.training = TrainingSettings.read(self.questions.training_config)
            yield from self.training.faults(self.subject)

    def configs(self) -> Iterator[Finding]:
        """The recorded one, the trainer's, and that of the trainer's settings, each against the model's."""
        trust = self.questions.trust_remote_code
        mine = effective_config(self.subject.reference.path, trust_remote_code=trust)
        record = self._record
        if record is not None and record.config is not None:
            yield from compare_configs(mine, record.config, "the checkpoint's metadata.json")
        for place in self._config_places():
            yield from compare_configs(mine, effective_config(place, trust_remote_code=trust), str(place))

    def tokenizers(self) -> Iterator[Finding]:
        """The recorded hashes, and the trainer's tokenizer, against the model's."""
        model = self.subject.reference.path
        record = self._record
        if record is not None and record.tokenizer:
            yield from compare_hashes(hash_tokenizer(model), record.tokenizer, "the checkpoint's metadata.json")
        embedding = embedding_of(self.subject.reference.specs)
        rows = self.subject.reference.specs[embedding].shape[0] if embedding else None
        places = [self.questions.tokenizer, self.training.tokenizer if self.training else None]
        for place in dict.fromkeys(place for place in places if place is not None):
            yield from compare_tokenizers(model, place)
            if rows is not None:
                yield from tokenizer_too_large(place, rows)

    def buffers(self) -> Iterator[Finding]:
        """The recorded ones and those of the trainer's live model, against those of a model made anew."""
        found: list[tuple[str, dict[str, Tensor]]] = []
        record = self._record
        if record is not None and record.buffers:
            found.append(("the checkpoint's metadata.json", recorded_buffers(record.buffers)))
        if self.questions.buffers is not None:
            found.append((str(self.questions.buffers), saved_buffers(self.questions.buffers)))
        if found:
            trust = self.questions.trust_remote_code
            fresh = describe(model_of_directory(self.subject.reference.path, trust_remote_code=trust)).transient
            for origin, buffers in found:
                yield from compare_buffers(fresh, buffers, origin)

    def live(self) -> Iterator[Finding]:
        """Logits, which need the model with its weights."""
        reference = self.subject.reference
        if reference.source is None:
            self.unseen.append(f"{reference.path} has no weights, so no logits can be compared")
            return
        if self._not_runnable():
            return
        model = LiveModel.of_directory(reference.path, trust_remote_code=self.questions.trust_remote_code)
        batch = self._batch(model)
        yield from self._logits(model, batch)
        if self.questions.reference_loss is not None:
            causes = list(possible_causes(model, batch))
            self.facts["loss, and why"] = {cause.text: cause.loss for cause in causes}
            yield from explain(causes, self.questions.reference_loss, batch)

    def _not_runnable(self) -> bool:
        """Whether there are no logits to ask for, since no class makes such a model. Who asks gets an error."""
        asked = self.questions.level == "model" or self.questions.batch or self.questions.reference_loss is not None
        kind = unknown_kind(self.subject.reference.config)
        if kind is None or asked:
            return False
        self.inapplicable.append(
            f"logits: transformers has no class for the model_type {kind!r} of {self.subject.reference.path}, so the "
            "model cannot be run; names, shapes and values do not need it"
        )
        return True

    def _batch(self, model: LiveModel) -> Batch:
        vocabulary = model.module.get_input_embeddings().weight.shape[0]
        if self.questions.batch is None:
            return fixed_batch(self.subject.reference.path, vocabulary)
        batch = read_batch(self.questions.batch)
        check_ids(batch, vocabulary, self.questions.batch)
        return batch

    def _logits(self, model: LiveModel, batch: Batch) -> Iterator[Finding]:
        expected = model.logits(batch)
        right = cross_entropy(expected, batch.labels)
        self.facts |= {"batch": batch.origin, "loss of the model": right}
        yield from _own_loss(model, batch, right)
        source, _ = self.subject.models.get(MAIN, (None, None))
        if source is None:
            return
        names = [name for name in source.specs if name in self.subject.reference.specs]
        loaded = model.with_weights(source, names)
        found = loaded.logits(batch)
        self._measure(expected, found, batch)
        if not self.subject.trained and not _same_logits(expected, found):
            yield from self._differing(model, batch, names)
        for place in self._config_places():
            self._loss_with(place, loaded, batch, names)

    def _measure(self, expected: Tensor, found: Tensor, batch: Batch) -> None:
        mean, most = divergence(expected, found)
        self.facts |= {
            "loss with the checkpoint's weights": cross_entropy(found, batch.labels),
            "loss of a random model, ln V": math.log(expected.shape[-1]),
            "largest difference of a logit": float((expected - found).abs().max()),
            "KL a token, mean": mean,
            "KL a token, largest": most,
        }

    def _differing(self, model: LiveModel, batch: Batch, names: list[str]) -> Iterator[Finding]:
        """Logits that differ although both sides are rounded alike.

        Rounding alone can send a token to another expert, and how far it moves a logit depends on the processor. Equal
        weights give equal logits on any. So what rounding explains is rounded on both sides.
        """
        source, _ = self.subject.models[MAIN]
        reference = self.subject.reference.source
        assert reference is not None
        compared = compare_sources(source, reference, _of_one_shape(source, reference, names))
        dtypes = {name: found.distance.rounding for name, found in compared.items() if found.distance}
        rounded = {name: dtype for name, dtype in dtypes.items() if dtype is not None}
        expected = model.with_weights(reference, list(reference.specs), rounded=rounded).logits(batch)
        found = model.with_weights(source, names, rounded=rounded).logits(batch)
        if not _same_logits(expected, found):
            apart = (
                f"{float((expected - found).abs().max()):.3g}, KL up to {divergence(expected, found)[1]:.3g} a token"
            )
            yield one(
                "logits-differ",
                [str(self.subject.path)],
                f"loss {cross_entropy(expected, batch.labels):.4f} on {batch.origin}",
                f"loss {cross_entropy(found, batch.labels):.4f}; logits differ by up to {apart}",
            )

    def _loss_with(self, place: Path, loaded: LiveModel, batch: Batch, names: list[str]) -> None:
        """What the trainer's config makes of the checkpoint's weights."""
        from shardsmith.diagnose.effective import config_of

        source, _ = self.subject.models[MAIN]
        try:
            config = config_of(place, trust_remote_code=self.questions.trust_remote_code)
            trained = loaded.with_weights(source, names, config)
            self.facts[f"loss with the config of {place}"] = cross_entropy(trained.logits(batch), batch.labels)
        except CheckpointError as error:
            self.unseen.append(str(error))

    @property
    def _record(self) -> InitialRecord | None:
        return self.subject.metadata.initial if self.subject.metadata else None

    def _config_places(self) -> list[Path]:
        places = [self.questions.config, self.training.model_config if self.training else None]
        return list(dict.fromkeys(place for place in places if place is not None))


def _same_logits(expected: Tensor, found: Tensor) -> bool:
    return float((expected - found).abs().max()) <= _SAME_LOGITS


def _of_one_shape(source: TensorSource, reference: TensorSource, names: list[str]) -> list[str]:
    return [name for name in names if source.specs[name].shape == reference.specs[name].shape]


def _own_loss(model: LiveModel, batch: Batch, right: float) -> Iterator[Finding]:
    """Whether the model's own loss is that of its logits, so that labels are shifted exactly once."""
    if batch.positions is not None:
        return
    reported = model.reported_loss(batch)
    if getattr(model.module.config, "output_router_logits", False):
        right += model.auxiliary_loss(batch) or 0.0
    if not abs(reported - right) <= _SAME_LOSS * max(1.0, right):
        yield one("loss-differs-from-logits", ["forward(labels=...)"], f"{right:.4f}", f"{reported:.4f}")
