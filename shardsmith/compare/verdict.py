"""What a diagnosis comes to, in a sentence or two."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardsmith.compare.findings import Diagnosis, Finding, Looked

_ELSEWHERE = (
    "If training still starts too high, look where no checkpoint shows anything: non-persistent buffers of the live "
    "model (--buffers; shardsmith.hooks.InitialLoad verifies them), the trainer's config (--config), its tokenizer "
    "(--tokenizer), its settings (--training-config), and labels and positions (--batch FILE --reference-loss X)."
)


def verdict_of(diagnosis: Diagnosis) -> str:
    """Says which part is at fault, and that the others are not, as far as they were looked at."""
    # The lowest level with a fault speaks: wrong names explain wrong values, and both explain wrong logits.
    wrong = {level.level: _faults(level) for level in diagnosis.levels}
    if wrong.get("structure"):
        more = f"; values: {_codes(wrong['values'])}" if wrong.get("values") else ""
        codes = _codes(wrong["structure"])
        return f"The checkpoint does not hold the model's tensors as they should be: {codes}{more}."
    if wrong.get("values"):
        return f"Names and shapes are right, values are not: {_codes(wrong['values'])}."
    weights = _weights(diagnosis)
    if wrong.get("model"):
        return f"{weights}; look at: {_codes(wrong['model'])}."
    return f"{weights}. {_ELSEWHERE}"


def _weights(diagnosis: Diagnosis) -> str:
    levels = {level.level: level for level in diagnosis.levels}
    if "values" not in levels:
        return "Names, shapes and counts are right; values were not looked at"
    facts = levels["values"].facts.get("main", {})
    compared, equal = facts.get("tensors compared", 0), facts.get("equal", 0)
    if not compared:
        return "Names, shapes and counts are right; no values were compared"
    left = facts.get("quantized, not compared", 0)
    if left:
        return f"Names, shapes and counts are right; no fault in {compared} tensors, {left} quantized ones not compared"
    # Training moves weights: then equality is no measure, and what counts is that no fault was found.
    if any(note.code == "trained-weights" for note in diagnosis.notes):
        return f"The weights are fine: trained from the model's, {equal} of {compared} tensors still equal"
    rounded = facts.get("rounded", 0)
    parts = [f"{equal} bit for bit" if equal < compared else "bit for bit"]
    parts += [f"{compared - equal - rounded} in another dtype"] if compared > equal + rounded else []
    parts += [f"{rounded} rounded to fewer bits"] if rounded else []
    how = ", ".join(parts)
    return f"The weights are fine: {compared} of {compared} tensors are the model's, {how}"


def _faults(level: Looked) -> list[Finding]:
    return [finding for finding in level.findings if finding.severity != "note"]


def _codes(findings: list[Finding]) -> str:
    return ", ".join(dict.fromkeys(finding.code for finding in findings))
