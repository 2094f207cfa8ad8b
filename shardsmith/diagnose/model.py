"""What lies beside the weights: config, tokenizer, buffers; and what the model answers with the checkpoint's weights.

Each part is looked at on its own: what one cannot be shown says nothing about the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from shardsmith.compare.configs import compare_configs, effective_config
from shardsmith.compare.effective import unknown_kind
from shardsmith.compare.findings import Finding, Looked, one
from shardsmith.compare.values import compare_sources
from shardsmith.conversion.model_directory import hash_tokenizer
from shardsmith.diagnose.batches import Batch
from shardsmith.diagnose.buffers import compare_buffers, recorded_buffers, saved_buffers
from shardsmith.diagnose.live_model import LiveModel
from shardsmith.diagnose.probe import Probe
from shardsmith.diagnose.questions import Questions
from shardsmith.diagnose.start_loss import cross_entropy, divergence, explain, labelled_padding, possible_causes
from shardsmith.diagnose.subject import Subject
from shardsmith.diagnose.tokenizers import (
    compare_hashes,
    compare_special_ids,
    compare_tokenizers,
    special_ids,
    tokenizer_too_large,
)
from shardsmith.diagnose.training_settings import TrainingSettings
from shardsmith.errors import CheckpointError, UnsupportedFormatError, UsageError
from shardsmith.export.load_check import apart
from shardsmith.hf.blueprint import describe, model_of_directory
from shardsmith.hf.vocabulary import embedding_of
from shardsmith.manifest.initial import InitialRecord
from shardsmith.tensors.checkpoint_keys import MAIN
from shardsmith.tensors.tensors import TensorSource

# Two ways to the same loss, in float32, differ by less.
_SAME_LOSS = 1e-3
# Of the largest logit: what the order of a sum may change.
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
        except (CheckpointError, UsageError) as error:
            self.unseen.append(str(error))

    def settings(self) -> Iterator[Finding]:
        """The trainer's."""
        if self.questions.training_config is not None:
            read = TrainingSettings.read(self.questions.training_config)
            self.training = read.with_flags(self.questions.training_flags)
            yield from self.training.faults(self.subject)
            if not self.training.names_a_checkpoint:
                self.unseen.append(
                    f"{self.training.file} names no initial_load_path: "
                    "if the trainer does not get it as a flag either, nothing is loaded"
                )

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
        # The same place may be given twice: once by option, once by the trainer's settings.
        for place in dict.fromkeys(place for place in places if place is not None):
            yield from compare_tokenizers(model, place)
            yield from compare_special_ids(model, place)
            if rows is not None and place != model:
                yield from tokenizer_too_large(place, rows)
        try:
            yield from tokenizer_too_large(model, rows) if rows is not None else ()
        except UnsupportedFormatError as error:  # nobody asked for it
            self.inapplicable.append(f"tokenizer: {error}")

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
            # Made once for all origins: it takes seconds.
            fresh = describe(model_of_directory(self.subject.reference.path, trust_remote_code=trust)).transient
            for origin, buffers in found:
                yield from compare_buffers(fresh, buffers, origin)

    def live(self) -> Iterator[Finding]:
        """Logits, which need the model with its weights."""
        reference = self.subject.reference
        if reference.source is None:
            self.unseen.append(f"{reference.path} {reference.lacks}: no logits can be compared")
            return
        if self._not_runnable():
            return
        if reason := self.subject.lacks_plain(MAIN, "no logits can be compared"):
            self.unseen.append(reason)
            return
        model = LiveModel.of_directory(reference.path, trust_remote_code=self.questions.trust_remote_code)
        try:
            probe = Probe.for_model(model, reference.path, self.questions.batch)
        except UsageError as error:
            self.unseen.append(f"logits: {error}")
            return
        yield from self._logits(model, probe, Probe.of_image(model))
        if probe.batch is not None and probe.batch.labelled:
            yield from labelled_padding(model, probe.batch, self._ids("pad"), self._ids("bos", "eos"))
        if probe.batch is None:
            self._unasked(model)
        elif self.questions.reference_loss is not None:
            borders = self._ids("bos", "eos")
            causes = list(possible_causes(model, probe.batch, self._ids("pad") or self._ids("eos"), borders))
            self.facts["loss, and why"] = {cause.text: cause.loss for cause in causes}
            yield from explain(causes, self.questions.reference_loss, probe.batch)
            if not probe.batch.given:
                self.unseen.append(
                    "--reference-loss without --batch: the loss of another batch says only whether the model is "
                    "random; give the trainer's first batch"
                )

    def _unasked(self, model: LiveModel) -> None:
        """What was given and is of no use for such a model."""
        given = {"--batch": self.questions.batch, "--reference-loss": self.questions.reference_loss}
        if names := [name for name, value in given.items() if value is not None]:
            kind = type(model.module).__name__
            self.unseen.append(f"{' and '.join(names)}: {kind} predicts no next token, so no loss was worked out")

    def _ids(self, *kinds: Literal["pad", "bos", "eos"]) -> set[int]:
        """Ids of the tokens that fill up, begin or end a text, as the tokenizer and the config say."""
        reference = self.subject.reference
        tokenizer = special_ids(reference.path)
        found: set[int] = set()
        for kind in kinds:
            said = (tokenizer.get(f"{kind}_token"), reference.config.get(f"{kind}_token_id"))
            found.update(i for one in said for i in (one if isinstance(one, list) else [one]) if isinstance(i, int))
        return found

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

    def _logits(self, model: LiveModel, probe: Probe, image: Probe | None) -> Iterator[Finding]:
        probes = [asked for asked in (probe, image) if asked is not None]
        expected = [asked.ask(model) for asked in probes]
        self.facts["batch"] = probe.with_image(image, model)
        if probe.batch is not None:
            self.facts["loss of the model"] = right = cross_entropy(expected[0], probe.batch.labels)
            yield from _own_loss(model, probe.batch, right)
        source, _ = self.subject.models.get(MAIN, (None, None))
        if source is None:
            return
        # The model's own tensors; heads of a trainer have no place in its class.
        names = [name for name in source.specs if name in self.subject.reference.specs]
        loaded = model.with_weights(source, names)
        for asked, answer in zip(probes, expected, strict=True):
            found = asked.ask(loaded)
            if asked is probe:
                self.facts |= _measured(answer, found, asked)
            # After training other logits are meant.
            if not self.subject.trained and not _same_logits(answer, found):
                yield from self._differing(model, asked, names)
        for place in self._config_places():
            self._loss_with(place, loaded, probe, names)

    def _differing(self, model: LiveModel, probe: Probe, names: list[str]) -> Iterator[Finding]:
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
        expected = probe.ask(model.with_weights(reference, list(reference.specs), rounded=rounded))
        found = probe.ask(model.with_weights(source, names, rounded=rounded))
        if not _same_logits(expected, found):
            losses, most = ("", ""), ""
            if probe.batch is not None:
                labels = probe.batch.labels
                losses = (f"loss {cross_entropy(expected, labels):.4f} ", f"loss {cross_entropy(found, labels):.4f}; ")
                most = f", KL up to {divergence(expected, found)[1]:.3g} a token"
            yield one(
                "logits-differ",
                [str(self.subject.path)],
                f"{losses[0] or 'the logits of the model '}on {probe.origin}",
                f"{losses[1]}logits differ by up to {float(apart(expected, found).abs().max()):.3g}{most}",
            )

    def _loss_with(self, place: Path, loaded: LiveModel, probe: Probe, names: list[str]) -> None:
        """What the trainer's config makes of the checkpoint's weights."""
        from shardsmith.compare.effective import config_of

        if probe.batch is None:
            return
        source, _ = self.subject.models[MAIN]
        try:
            config = config_of(place, trust_remote_code=self.questions.trust_remote_code)
            trained = loaded.with_weights(source, names, config)
            loss = cross_entropy(probe.ask(trained), probe.batch.labels)
            self.facts[f"loss with the config of {place}"] = loss
        except CheckpointError as error:
            self.unseen.append(str(error))

    @property
    def _record(self) -> InitialRecord | None:
        return self.subject.metadata.initial if self.subject.metadata else None

    def _config_places(self) -> list[Path]:
        places = [self.questions.config, self.training.model_config if self.training else None]
        return list(dict.fromkeys(place for place in places if place is not None))


def _measured(expected: Tensor, found: Tensor, probe: Probe) -> dict[str, Any]:
    facts: dict[str, Any] = {"largest difference of a logit": float(apart(expected, found).abs().max())}
    if probe.batch is not None:
        mean, most = divergence(expected, found)
        facts |= {
            "loss with the checkpoint's weights": cross_entropy(found, probe.batch.labels),
            "loss of a random model, ln V": math.log(expected.shape[-1]),
            "KL a token, mean": mean,
            "KL a token, largest": most,
        }
    return facts


def _same_logits(expected: Tensor, found: Tensor) -> bool:
    finite = expected[expected.isfinite()].abs()
    # Relative to the largest finite logit: masked ones are infinite, and small ones may be all there is.
    largest = max(1.0, float(finite.max())) if finite.numel() else 1.0
    return float(apart(expected, found).abs().max()) <= _SAME_LOGITS * largest


def _of_one_shape(source: TensorSource, reference: TensorSource, names: list[str]) -> list[str]:
    return [name for name in names if source.specs[name].shape == reference.specs[name].shape]


def _own_loss(model: LiveModel, batch: Batch, right: float) -> Iterator[Finding]:
    """Whether the model's own loss is that of its logits, so that labels are shifted exactly once."""
    if batch.positions is not None or model.is_library_class:
        return  # the library's classes are the measure; some of them take labels that are shifted already
    reported = model.reported_loss(batch)
    # Some models add it to the loss that they report, as the config says.
    if getattr(model.module.config, "output_router_logits", False):
        right += model.auxiliary_loss(batch) or 0.0
    # Negated, so that NaN is a difference.
    if not abs(reported - right) <= _SAME_LOSS * max(1.0, right):
        yield one("loss-differs-from-logits", ["forward(labels=...)"], f"{right:.4f}", f"{reported:.4f}")
