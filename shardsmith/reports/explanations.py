"""What a code of a finding means, as docs/troubleshooting.md says it: that file is in the package, too."""

from __future__ import annotations

import functools
import importlib.metadata
import re
from collections.abc import Iterable, Sequence
from importlib import resources

from shardsmith.reports.page import safe, section

# From a heading that is a code up to the next heading, or to the end.
_SECTION = re.compile(r"^### `(?P<code>[a-z0-9-]+)`\n(?P<text>.*?)(?=^##|\Z)", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\[(?P<text>[^\]]*)\]\([^)]*\)")


def code_link(code: str) -> str:
    """Return the code of a finding, linked to its explanation in the same page."""
    return f'<b><a href="#code-{safe(code)}">{safe(code)}</a></b>'


def explanations(codes: Iterable[str], urls: Sequence[str] | None = None) -> list[str]:
    """Return a part of a page that explains each of some codes, to which ``code_link`` leads; nothing without codes.

    Args:
        codes: Headings of docs/troubleshooting.md.
        urls: As in the package's metadata, ``"Documentation, https://..."``; None looks there. If it is known where the
            documentation is, each explanation leads there.
    """
    sites = _sites(_project_urls() if urls is None else urls)
    # Each once, in the order in which the page has them.
    return section("What the codes mean", [_explanation(code, sites) for code in dict.fromkeys(codes)])


def _explanation(code: str, sites: Sequence[str]) -> str:
    title = f"<code>{safe(code)}</code>"
    if sites:
        title = f'<a href="{safe(sites[0].rstrip("/"))}/troubleshooting/#{safe(code)}">{title}</a>'
    return f'<div class="explanation" id="code-{safe(code)}"><h3>{title}</h3>{_texts().get(code, "")}</div>'


@functools.cache
def _texts() -> dict[str, str]:
    """By code, as HTML. Its links lead to other pages of the documentation, which are not here: their words stay."""
    from markdown_it import MarkdownIt

    # Beside this module in the package; a clone has a link to docs/ there.
    text = resources.files(__package__).joinpath("troubleshooting.md").read_text(encoding="utf-8")
    # No HTML of the text gets into the page: what looks like it is escaped.
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    return {one["code"]: markdown.render(_LINK.sub(r"\g<text>", one["text"])) for one in _SECTION.finditer(text)}


def _sites(urls: Iterable[str]) -> list[str]:
    parts = (url.partition(",") for url in urls)
    return [address.strip() for name, _, address in parts if name.strip() == "Documentation"]


def _project_urls() -> list[str]:
    try:
        return importlib.metadata.metadata("shardsmith").get_all("Project-URL") or []
    except importlib.metadata.PackageNotFoundError:  # a clone that was not installed
        return []
