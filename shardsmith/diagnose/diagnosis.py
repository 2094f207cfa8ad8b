"""Look at a checkpoint on all levels asked for. Reads only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from shardsmith.checking.arguments import checked
from shardsmith.checking.types import AsAnyPath
from shardsmith.compare.findings import LEVELS, Diagnosis, Level, Looked
from shardsmith.diagnose.questions import Questions
from shardsmith.diagnose.structure import look_at_structure, unreadable
from shardsmith.diagnose.subject import Reference, Subject
from shardsmith.errors import CheckpointError
from shardsmith.formats.by_path import detect_checkpoint_format


@checked
def diagnose(checkpoint: AsAnyPath, model: AsAnyPath, questions: Questions) -> Diagnosis:
    """Compare a checkpoint with a Hugging Face model. Writes nothing, downloads nothing.

    Raises:
        CheckpointError: the model cannot be read, or the checkpoint is none that we read.
    """
    # Without a model there is nothing to compare with: this error ends the command.
    reference = Reference.open(model)
    try:
        subject = Subject.open(checkpoint, reference, questions.trained, questions.names, questions.rules)
    except CheckpointError as error:
        reference.close()
        # A checkpoint that cannot be read is itself what was looked for, if the checkpoint is to blame.
        finding = unreadable(error)
        if finding is None:
            raise
        found = detect_checkpoint_format(checkpoint).name
        return Diagnosis(str(checkpoint), str(model), found, (Looked("structure", (finding,)),))
    # Names, shapes and counts cost nothing and belong to every verdict.
    levels = LEVELS if questions.level == "all" else tuple(dict.fromkeys(("structure", questions.level)))
    try:
        looked = [_look(level, subject, questions) for level in levels]
        # What was asked for and not looked at must not pass for right: it makes the exit status 2.
        if "model" not in levels:
            unused = tuple(f"{option}: only the level model looks at it" for option in _of_the_model_level(questions))
            looked[-1] = replace(looked[-1], unseen=(*looked[-1].unseen, *unused))
        return Diagnosis(str(checkpoint), str(model), subject.opened.format, tuple(looked))
    finally:
        subject.close()


def _of_the_model_level(questions: Questions) -> list[str]:
    """Options that were given and that only the level ``model`` looks at."""
    names = ("config", "tokenizer", "training_config", "batch", "buffers", "reference_loss")
    return [f"--{name.replace('_', '-')}" for name in names if getattr(questions, name) is not None]


def _look(level: Level, subject: Subject, questions: Questions) -> Looked:
    """One level; what fails there ends that level alone."""
    # Lambdas: each level imports what it needs when it is looked at.
    looks: dict[Level, Callable[[], Looked]] = {
        "structure": lambda: look_at_structure(subject, questions.layout),
        "values": lambda: _values(subject),
        "model": lambda: _model(subject, questions),
    }
    try:
        return looks[level]()
    except CheckpointError as error:
        finding = unreadable(error)
        return Looked(level, (finding,)) if finding else Looked(level, unseen=(f"{level}: {error}",))


def _values(subject: Subject) -> Looked:
    from shardsmith.diagnose.values import look_at_values

    return look_at_values(subject)


def _model(subject: Subject, questions: Questions) -> Looked:
    from shardsmith.diagnose.model import look_at_model

    return look_at_model(subject, questions)
