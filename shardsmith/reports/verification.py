"""The page of ``verify A B --html``: a map of what differs, and a table of all tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from shardsmith.compare.verification import Difference, ModelVerification, Verification
from shardsmith.reports.page import make_page, safe, section
from shardsmith.reports.tensor_map import Cell, by_difference, legend, tensor_map
from shardsmith.reports.tensor_table import Value, sortable_table

DIFFERENCE_LEGEND = {
    "equal": by_difference(0.0),
    "1e-6": by_difference(1e-6),
    "1e-3": by_difference(1e-3),
    "1 or more": by_difference(1.0),
    "not compared by value": by_difference(None),
}
_COLUMNS = ("tensor", "relative difference", "largest difference", "elements that differ", "result", "A", "B")


def verification_page(found: Verification, command: Sequence[str]) -> str:
    """Return the page.

    Args:
        found: What was compared.
        command: The command that makes the page.
    """
    differing = sum(len(model.differences) for model in found.models)
    tensors = sum(len(_names(model)) for model in found.models)
    verdict = "the same model" if found.same else f"not the same model: {differing} of {tensors} tensors differ"
    if found.settings and not differing:
        verdict = "not the same model: all tensors are the same, and settings that may change what they compute are not"
    sides = f"<p>A: <code>{safe(found.left)}</code><br>B: <code>{safe(found.right)}</code></p>"
    if found.is_undecided:
        verdict = f"not known to be the same model: {differing} of {tensors} tensors have names that the other lacks"
    parts = [sides, f'<p class="verdict{"" if found.same else " bad"}">{safe(verdict)}</p>']
    parts += [
        f"<p>{safe(name)}: A says {safe(left)}, B {safe(right)}</p>" for name, (left, right) in found.settings.items()
    ]
    parts += [f"<p>Not compared: {safe(line)}</p>" for line in found.left_out]
    for number, model in enumerate(found.models):
        parts += section(f"Model {model.model}", list(_model(number, model)))
    return make_page("Comparison of two checkpoints", parts, command)


def _model(number: int, model: ModelVerification) -> Iterator[str]:
    yield f"<p>{model.compared} tensors compared, {model.equal} equal, {len(model.differences)} differ</p>"
    if model.differences and all(one.is_rounding for one in model.differences):
        yield "<p>One side is the other, rounded to fewer bits: <code>--rounding</code> accepts that.</p>"
    yield legend(DIFFERENCE_LEGEND)
    names = _names(model)
    anchors = {name: f"m{number}t{i}" for i, name in enumerate(names)}
    found = {one.name: one for one in model.differences}
    yield tensor_map(
        [Cell(name, model.relative.get(name), _result(model, name, found.get(name)), anchors[name]) for name in names],
        by_difference,
    )
    yield from sortable_table(
        _COLUMNS, ((anchors[name], _row(model, name, found.get(name))) for name in names), "tensors"
    )


def _names(model: ModelVerification) -> list[str]:
    """All tensors, in the order of A; those of which only one side has any last."""
    # A set would lose the order; names of only one side have no relative difference.
    return list(dict.fromkeys([*model.relative, *(one.name for one in model.differences)]))


def _result(model: ModelVerification, name: str, found: Difference | None) -> str:
    if found is not None:
        return found.problem if found.relative is None else f"{found.problem} by {found.relative:.3g}"
    return "equal but for its dtype" if name in model.converted else "equal"


def _row(model: ModelVerification, name: str, found: Difference | None) -> list[Value]:
    relative, result = model.relative.get(name), _result(model, name, found)
    if found is None:
        return [name, relative, None, None, result, "", ""]
    return [name, relative, found.largest, found.differing, found.problem, found.left, found.right]
