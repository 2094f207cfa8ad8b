"""A diagnosis as one HTML file that stands on its own: findings by effect, a map and a table of the tensors."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping

from shardsmith.compare.findings import Diagnosis, Finding, Looked
from shardsmith.diagnose.text import TITLES, rows_of
from shardsmith.reports.explanations import code_link, explanations
from shardsmith.reports.page import make_page, safe, section
from shardsmith.reports.tensor_map import Cell, by_difference, legend, tensor_map
from shardsmith.reports.tensor_table import sortable_table
from shardsmith.reports.verification import DIFFERENCE_LEGEND

_OPEN_NAMES = 12


def html_of(diagnosis: Diagnosis) -> str:
    """Return the whole page. Names and texts from the checkpoint are escaped."""
    relative = {model: found for level in diagnosis.levels for model, found in level.relative.items()}
    command = ["shardsmith", "diagnose", "--checkpoint", diagnosis.checkpoint, "--base-model", diagnosis.model]
    # "error" comes before "warning"; within each, the tensors that are furthest from the model's.
    faults = sorted(diagnosis.faults, key=lambda one: (one.severity, -_effect(one, relative)))
    parts = [
        f"<p>{safe(diagnosis.format)}, against <code>{safe(diagnosis.model)}</code></p>",
        f'<p class="verdict{" bad" if diagnosis.faults else ""}">{safe(diagnosis.verdict)}</p>',
        f"<p>{safe(_counts(diagnosis, relative))}</p>",
        *section("What is wrong", [_finding(finding, diagnosis) for finding in faults]),
        *section("What could not be looked at", [f"<p>{safe(line)}</p>" for line in diagnosis.unseen]),
        *section("What does not apply to such a model", [f"<p>{safe(line)}</p>" for line in diagnosis.inapplicable]),
        # By number and not by name: an anchor has to be unique in the page and valid in HTML.
        *(
            part
            for number, model in enumerate(relative)
            for part in _tensors(number, model, relative[model], diagnosis)
        ),
        *(part for level in diagnosis.levels for part in _level(level)),
        *section("What looks wrong and is not", [_finding(note, diagnosis) for note in diagnosis.notes]),
        *explanations(finding.code for finding in (*faults, *diagnosis.notes)),
    ]
    return make_page(diagnosis.checkpoint, parts, command)


def _counts(diagnosis: Diagnosis, relative: Mapping[str, Mapping[str, float]]) -> str:
    tensors = {name for found in relative.values() for name in found}
    concerned = {name for finding in diagnosis.faults for name in finding.where if name in tensors}
    count = len(diagnosis.faults)
    findings = f"{count} finding{'s' * (count != 1)}"
    return f"{findings} in {len(concerned)} of {len(tensors)} tensors" if tensors else findings


def _effect(finding: Finding, relative: Mapping[str, Mapping[str, float]]) -> float:
    """How far the tensors of a finding are from the reference's: the more, the more the loss suffers."""
    return max((found[name] for found in relative.values() for name in finding.where if name in found), default=0.0)


def _tensors(number: int, model: str, relative: Mapping[str, float], diagnosis: Diagnosis) -> Iterator[str]:
    """A map and a table of one model's tensors."""
    found: dict[str, list[str]] = {}
    for one in (*diagnosis.faults, *diagnosis.notes):
        for name in one.where:
            found.setdefault(name, []).append(one.code)
    codes = {name: ", ".join(found.get(name, ())) for name in relative}
    anchors = {name: f"m{number}t{i}" for i, name in enumerate(relative)}
    cells = [
        Cell(name, value, f"relative difference {value:.3g} {codes[name]}", anchors[name])
        for name, value in relative.items()
    ]
    rows = ((anchors[name], (name, value, codes[name])) for name, value in relative.items())
    yield from section(
        f"Model {model}: difference from the reference's tensors",
        [
            legend(DIFFERENCE_LEGEND),
            tensor_map(cells, by_difference),
            *sortable_table(("tensor", "relative difference", "findings"), rows, "tensors"),
        ],
    )


def _level(level: Looked) -> Iterator[str]:
    rows = [
        f'<tr><td>{safe(model)}</td><td>{safe(name)}</td><td class="number">{safe(value)}</td></tr>'
        for model, name, value in rows_of(level.facts)
    ]
    if rows:
        yield f"<h2>{level.level.capitalize()}: {TITLES[level.level]}</h2><table>"
        yield from rows
        yield "</table>"


def _finding(finding: Finding, diagnosis: Diagnosis) -> str:
    rows = {
        "where": _names(finding.where),
        "expected": safe(finding.expected),
        "found": safe(finding.found),
        "effect on the loss": safe(finding.effect),
        "how to fix it": safe(_filled_in(finding.fix, diagnosis)),
    }
    cells = "".join(f"<tr><th>{name}</th><td>{text}</td></tr>" for name, text in rows.items())
    title = f"{code_link(finding.code)} ({finding.severity})"
    return f'<div class="finding {finding.severity}">{title}<table>{cells}</table></div>'


def _names(names: tuple[str, ...]) -> str:
    listed = "<br>".join(f"<code>{safe(name)}</code>" for name in names)
    if len(names) <= _OPEN_NAMES:
        return listed
    return f"<details><summary>{len(names)} of them</summary>{listed}</details>"


def _filled_in(fix: str, diagnosis: Diagnosis) -> str:
    """The fix with the paths of this checkpoint and this model in its commands."""
    words = {"MODEL": diagnosis.model, "CKPT": diagnosis.checkpoint, "NEW": f"{diagnosis.checkpoint}-converted"}
    return re.sub(rf"\b({'|'.join(words)})\b", lambda match: shlex.quote(words[match[1]]), fix)
