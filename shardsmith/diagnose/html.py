"""A diagnosis as one HTML file that stands on its own: no script, nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from shardsmith.compare.findings import Diagnosis, Finding, Looked
from shardsmith.diagnose.text import TITLES, rows_of
from shardsmith.ground.printable import printable

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --good: #2e7d32;
  --error: #c62828; --warning: #b26a00; --note: #1565c0 }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.3rem } h2 { font-size: 1.1rem; margin-top: 2rem }
code { font: 13px/1.4 ui-monospace, monospace; overflow-wrap: anywhere }
table { border-collapse: collapse } td, th { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top }
.verdict { padding: .8rem 1rem; border-left: .4rem solid var(--good) } .verdict.bad { border-color: var(--error) }
.finding { border: 1px solid var(--line); border-left: .4rem solid var(--note); padding: .4rem 1rem; margin: .8rem 0 }
.finding.error { border-left-color: var(--error) } .finding.warning { border-left-color: var(--warning) }
.number { text-align: right; font-variant-numeric: tabular-nums }
"""
_OPEN_NAMES = 12


def html_of(diagnosis: Diagnosis) -> str:
    """Return the whole page. Names and texts from the checkpoint are escaped."""
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width">',
            f"<title>{_text(diagnosis.checkpoint)}</title><style>{_STYLE}</style></head><body>",
            f"<h1>{_text(diagnosis.checkpoint)}</h1>",
            f"<p>{_text(diagnosis.format)}, against <code>{_text(diagnosis.model)}</code></p>",
            f'<p class="verdict{" bad" if diagnosis.faults else ""}">{_text(diagnosis.verdict)}</p>',
            *_section("What is wrong", [_finding(finding) for finding in diagnosis.faults]),
            *_section("What could not be looked at", [f"<p>{_text(line)}</p>" for line in diagnosis.unseen]),
            *_section(
                "What does not apply to such a model", [f"<p>{_text(line)}</p>" for line in diagnosis.inapplicable]
            ),
            *(part for level in diagnosis.levels for part in _level(level)),
            *_section("What looks wrong and is not", [_finding(note) for note in diagnosis.notes]),
            "</body></html>\n",
        ]
    )


def _section(title: str, parts: list[str]) -> Iterator[str]:
    if parts:
        yield f"<h2>{title}</h2>"
        yield from parts


def _level(level: Looked) -> Iterator[str]:
    rows = [
        f'<tr><td>{_text(model)}</td><td>{_text(name)}</td><td class="number">{_text(value)}</td></tr>'
        for model, name, value in rows_of(level.facts)
    ]
    if rows:
        yield f"<h2>{level.level.capitalize()}: {TITLES[level.level]}</h2><table>"
        yield from rows
        yield "</table>"


def _finding(finding: Finding) -> str:
    rows = {
        "where": _names(finding.where),
        "expected": _text(finding.expected),
        "found": _text(finding.found),
        "effect on the loss": _text(finding.effect),
        "how to mend it": _text(finding.mend),
    }
    cells = "".join(f"<tr><th>{name}</th><td>{text}</td></tr>" for name, text in rows.items())
    title = f"<b>{finding.code}</b> ({finding.severity})"
    return f'<div class="finding {finding.severity}">{title}<table>{cells}</table></div>'


def _names(names: tuple[str, ...]) -> str:
    listed = "<br>".join(f"<code>{_text(name)}</code>" for name in names)
    if len(names) <= _OPEN_NAMES:
        return listed
    return f"<details><summary>{len(names)} of them</summary>{listed}</details>"


def _text(value: str) -> str:
    """Safe in HTML, and as UTF-8, which cannot hold the lone surrogates that a name may have."""
    return escape("\n".join(printable(line) for line in value.split("\n")))
