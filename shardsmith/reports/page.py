"""The frame of every page: one file, nothing from elsewhere, for wide and narrow screens, light and dark."""

from __future__ import annotations

import datetime
import shlex
from collections.abc import Iterable, Sequence
from html import escape

from shardsmith.ground.printable import printable

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --good: #2e7d32; --warning: #b26a00; --quiet: #8888;
  --error: light-dark(#c62828, #ef9a9a); --note: light-dark(#1565c0, #64b5f6); --faint: light-dark(#666, #aaa) }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 1.5rem auto; padding: 0 1rem }
h1 { font-size: 1.3rem; overflow-wrap: anywhere } h2 { font-size: 1.1rem; margin-top: 2rem } h3 { font-size: 1rem }
code { font: 13px/1.4 ui-monospace, monospace; overflow-wrap: anywhere }
table { border-collapse: collapse } td, th { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top }
.verdict { padding: .8rem 1rem; border-left: .4rem solid var(--good) } .verdict.bad { border-color: var(--error) }
.finding { border: 1px solid var(--line); border-left: .4rem solid var(--note); padding: .4rem 1rem; margin: .8rem 0 }
.finding.error { border-left-color: var(--error) } .finding.warning { border-left-color: var(--warning) }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.bad-text { color: var(--error) } .explanation:target { outline: 2px solid var(--note); outline-offset: .4rem }
.explanation pre { overflow-x: auto; background: #8882; padding: .4rem }
.wide { overflow-x: auto } .listing { max-height: 32rem; overflow: auto; border: 1px solid var(--line) }
.listing th { position: sticky; top: 0; background: Canvas; cursor: pointer; padding-left: .5rem;
  white-space: nowrap }
th[aria-sort=ascending]::after { content: " ▲" } th[aria-sort=descending]::after { content: " ▼" }
.listing td { padding-left: .5rem; border-top: 1px solid var(--line); white-space: nowrap }
.listing td.long { white-space: normal; overflow-wrap: anywhere; min-width: 20rem }
.listing tr { scroll-margin-top: 4rem } tr:target { outline: 2px solid var(--note) }
input[type=search] { font: inherit; width: min(100%, 24rem); margin: .5rem 0; padding: .2rem .4rem }
svg text { font: 11px system-ui, sans-serif; fill: currentColor } svg { max-width: none; display: block }
.charts { display: flex; flex-wrap: wrap; gap: 1.5rem 2rem } svg.chart { max-width: 100%; height: auto }
figure { margin: 0; max-width: 340px } figcaption { font-size: 13px; font-weight: 600; line-height: 1.3 }
footer { margin-top: 3rem; border-top: 1px solid var(--line); color: var(--faint); overflow-wrap: anywhere }
@media (max-width: 40rem) { body { margin: .5rem auto } .finding :is(tr, th, td) { display: block; padding-bottom: 0 } }
"""
_SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], search = table.parentElement.previousElementSibling.querySelector("input");
  search.addEventListener("input", () => {
    const words = search.value.toLowerCase().split(" ").filter(Boolean);
    for (const row of body.rows) {
      const found = row.textContent.toLowerCase();
      row.hidden = !words.every(word => found.includes(word));
    }
  });
  const heads = [...table.tHead.rows[0].cells];
  const value = cell => {
    const number = cell.dataset.value;
    return number === undefined ? cell.textContent : number === "NaN" ? Infinity : number === "" ? "" : Number(number);
  };
  heads.forEach((head, column) => {
    const sort = () => {
      const order = head.ariaSort === "ascending" ? -1 : 1;
      const rows = [...body.rows].map(row => [value(row.cells[column]), row]).sort(([x], [y]) =>
        x === "" || y === "" ? (x === "") - (y === "")
          : order * (typeof x === "number" ? (x > y) - (x < y) : x.localeCompare(y, undefined, { numeric: true })));
      heads.forEach(other => other.ariaSort = null);
      head.ariaSort = order === 1 ? "ascending" : "descending";
      body.append(...rows.map(([, row]) => row));
    };
    head.tabIndex = 0;
    head.addEventListener("click", sort);
    head.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
  });
  addEventListener("hashchange", () => {
    const row = document.getElementById(location.hash.slice(1));
    if (row?.hidden && body.contains(row)) {
      search.value = "";
      search.dispatchEvent(new Event("input"));
      row.scrollIntoView();
    }
  });
}
"""


def make_page(title: str, parts: Iterable[str], command: Sequence[str]) -> str:
    """Return a page.

    Args:
        title: Its heading, as plain text.
        parts: HTML, in order. Texts in it are escaped, by ``safe``.
        command: The command that makes the page, word by word.
    """
    # UTC: the page is read elsewhere than where it was made.
    made = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width">',
            f"<title>{safe(title)}</title><style>{_STYLE}</style></head><body>",
            f"<h1>{safe(title)}</h1>",
            *parts,
            f"<footer>Shardsmith {_version()}, {made}: <code>{safe(shlex.join(command))}</code></footer>",
            # Behind all tables: the script runs when it is reached.
            f"<script>{_SCRIPT}</script></body></html>\n",
        ]
    )


def section(title: str, parts: Sequence[str]) -> list[str]:
    """Return parts under a heading; nothing without parts."""
    return [f"<h2>{safe(title)}</h2>", *parts] if parts else []


def facts_table(rows: Iterable[tuple[str, str]]) -> str:
    """Return a table of two columns, of plain texts."""
    cells = (f"<tr><th>{safe(name)}</th><td>{safe(value)}</td></tr>" for name, value in rows)
    return f"<table>{''.join(cells)}</table>"


def safe(value: str) -> str:
    """Return a text safe in HTML, and as UTF-8, which cannot hold the lone surrogates that a name may have."""
    return escape("\n".join(printable(line) for line in value.split("\n")))


def _version() -> str:
    import shardsmith

    return shardsmith.__version__
