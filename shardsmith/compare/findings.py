"""What a diagnosis finds, as data. Printing it is done in files of their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from shardsmith.compare.codes import CODES, Severity

Level = Literal["structure", "values", "model"]
LEVELS: tuple[Level, ...] = ("structure", "values", "model")


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault of a checkpoint, or, as a note, something that looks like a fault and is none."""

    code: str
    """A key of ``CODES`` and a heading of docs/troubleshooting.md."""
    where: tuple[str, ...]
    """The tensors, buffers, settings or files concerned, all of them."""
    expected: str
    found: str

    @property
    def severity(self) -> Severity:
        """``error``, ``warning`` or ``note``."""
        return CODES[self.code].severity

    @property
    def effect(self) -> str:
        """Effect on the loss."""
        return CODES[self.code].effect

    @property
    def fix(self) -> str:
        """How to fix it."""
        return CODES[self.code].fix

    def as_dict(self) -> dict[str, Any]:
        """Return the finding as plain values, for JSON."""
        names = ("code", "severity", "where", "expected", "found", "effect", "fix")
        return {name: getattr(self, name) for name in names} | {"mend": self.fix}  # its older name


@dataclass(frozen=True, slots=True)
class Looked:
    """What one level has found."""

    level: Level
    findings: tuple[Finding, ...] = ()
    """Faults and notes, in the order in which they were found."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What was measured, by what it is called."""
    unseen: tuple[str, ...] = ()
    """What could not be looked at, and why, one line each."""
    inapplicable: tuple[str, ...] = ()
    """What nobody can look at in such a model, and why: it is said, and counts for nothing."""
    relative: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """By model and tensor: the length of the difference from the reference's, divided by the length of that."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All that was found."""

    checkpoint: str
    model: str
    format: str
    """Of the checkpoint, as ``shardsmith detect`` calls it."""
    levels: tuple[Looked, ...]

    @property
    def faults(self) -> tuple[Finding, ...]:
        """Findings that are no notes, errors first."""
        found = [finding for level in self.levels for finding in level.findings if finding.severity != "note"]
        # As words, "error" comes before "warning"; the sort keeps the order of finding within each.
        return tuple(sorted(found, key=lambda finding: finding.severity))

    @property
    def notes(self) -> tuple[Finding, ...]:
        """What looks wrong and is not."""
        return tuple(finding for level in self.levels for finding in level.findings if finding.severity == "note")

    @property
    def unseen(self) -> tuple[str, ...]:
        """What could not be looked at, and why."""
        return tuple(line for level in self.levels for line in level.unseen)

    @property
    def inapplicable(self) -> tuple[str, ...]:
        """What cannot be asked of such a model, and why."""
        return tuple(line for level in self.levels for line in level.inapplicable)

    @property
    def exit_code(self) -> int:
        """0 clean, 1 faults, 2 nothing wrong was found but not all could be looked at."""
        # A fault is a result, whatever else was not looked at; 2 only says that none was found so far.
        return 1 if self.faults else 2 if self.unseen else 0

    @property
    def verdict(self) -> str:
        """In a sentence or two: what is wrong, or where else to look."""
        # Here and not above: ``verdict`` needs the classes of this file.
        from shardsmith.compare.verdict import verdict_of

        return verdict_of(self)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "checkpoint": self.checkpoint,
            "model": self.model,
            "format": self.format,
            "levels": [level.level for level in self.levels],
            "verdict": self.verdict,
            "findings": [finding.as_dict() for finding in self.faults],
            "notes": [finding.as_dict() for finding in self.notes],
            "unseen": list(self.unseen),
            "inapplicable": list(self.inapplicable),
            "facts": {level.level: level.facts for level in self.levels},
        }


def one(code: str, where: Iterable[str], expected: object, found: object) -> Finding:
    """Return a finding about some things."""
    return Finding(code, tuple(where), str(expected), str(found))
