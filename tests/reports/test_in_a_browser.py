"""The pages as a browser shows them: on a phone and a wide screen, light and dark, sorted, searched and clicked."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.browser import CHROMIUM, Browser
from tests.reports.made_pages import EVIL, make_pages

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="neither Chromium nor Chrome is installed")

PAGES = ("diagnose", "verify", "inspect", "statistics", "run")
PHONE, WIDE = 390, 1280
_CONTRASTS = """(() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const over = (colours) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (colour) => {
    const [r, g, b] = colour.map(c => c / 255).map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const root = document.createElement("div");
  root.style.background = "Canvas";
  document.body.append(root);
  const bottom = getComputedStyle(root).backgroundColor;
  root.remove();
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const element = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || ["SCRIPT", "title"].includes(element.tagName)) continue;
    const behind = [bottom];
    for (let e = element; e; e = e.parentElement) behind.splice(1, 0, getComputedStyle(e).backgroundColor);
    const style = getComputedStyle(element);
    const text = element instanceof SVGElement ? style.fill : style.color;
    const [x, y] = [light(over(behind)), light(over([...behind, text]))];
    found.push([(Math.max(x, y) + 0.05) / (Math.min(x, y) + 0.05), walk.currentNode.data.trim().slice(0, 60)]);
  }
  return [bottom, found];
})()"""
"""How far each text stands out from what is behind it, by the formula of the WCAG, and the colour of the page."""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_pages(tmp_path_factory.mktemp("pages"))


def column(browser: Browser, number: int, *, shown: bool = False) -> list[str]:
    """The texts of a column of the first table, from top to bottom."""
    rows = "document.querySelector('table.sortable').tBodies[0].rows"
    visible = ".filter(row => row.offsetHeight)" if shown else ""
    found: list[str] = browser.value(f"[...{rows}]{visible}.map(row => row.cells[{number}].textContent)")
    return found


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [PHONE, WIDE])
@pytest.mark.parametrize("page", PAGES)
def test_a_page_fits_the_screen_asks_for_nothing_and_complains_of_nothing(
    page: str, width: int, dark: bool, browser: Browser, pages: dict[str, Path]
) -> None:
    browser.open(pages[page], width=width, dark=dark)
    assert browser.requests() == [pages[page].resolve().as_uri()]
    assert browser.complaints() == []
    assert browser.value("[document.documentElement.scrollWidth, document.body.innerText.length > 100]") == [
        width,
        True,
    ]


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("page", PAGES)
def test_every_text_stands_out_from_the_page_in_the_light_and_in_the_dark(
    page: str, dark: bool, browser: Browser, pages: dict[str, Path]
) -> None:
    browser.open(pages[page], width=WIDE, dark=dark)
    behind, found = browser.value(_CONTRASTS)
    assert (behind != "rgb(255, 255, 255)") == dark
    assert len(found) > 30
    assert [text for contrast, text in found if contrast < 4.5] == []


@pytest.mark.parametrize("page", PAGES)
def test_a_click_on_a_heading_sorts_by_it_and_another_one_turns_the_order(
    page: str, browser: Browser, pages: dict[str, Path]
) -> None:
    browser.open(pages[page], width=WIDE)
    heads = browser.value("document.querySelector('table.sortable').tHead.rows[0].cells.length")
    ids = "[...document.querySelector('table.sortable').tBodies[0].rows].map(row => row.id)"
    all_rows = sorted(browser.value(ids))
    for number in range(heads):
        if not any(before := column(browser, number)):
            continue
        for order in ("ascending", "descending"):
            browser.click(f"table.sortable thead th:nth-child({number + 1})")
            sorts = browser.value("[...document.querySelectorAll('table.sortable')][0].tHead.innerHTML")
            assert sorts.count(f'aria-sort="{order}"') == sorts.count("aria-sort") == 1
            found = column(browser, number)
            filled = [text for text in found if text]
            assert found == filled + [""] * (len(found) - len(filled)), "what is not known comes last"
            assert sorted(found) == sorted(before)
            if (values := numbers(filled)) is not None:
                assert values == sorted(values, reverse=order == "descending")
            elif number != 0:  # of names, whose signs each language sorts otherwise, the next test looks at the layers
                assert filled == sorted(filled, key=natural, reverse=order == "descending")
        assert sorted(browser.value(ids)) == all_rows


def numbers(texts: list[str]) -> list[float] | None:
    """With NaN as the greatest; None if a text is no number."""
    try:
        values = [float(text.replace(",", "")) for text in texts]
    except ValueError:
        return None
    return [math.inf if math.isnan(value) else value for value in values]


def natural(text: str) -> list[str | int]:
    return [int(part) if part.isdigit() else part.lower() for part in re.split(r"([0-9]+)", text)]


def test_layers_are_sorted_by_their_numbers(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["verify"], width=WIDE)
    browser.click("table.sortable th")
    names = [name for name in column(browser, 0) if name.endswith("q_proj.weight")]
    assert names == [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(12)]


def test_typing_leaves_the_rows_that_have_all_words(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["statistics"], width=PHONE)
    names = set(load_file(pages["statistics"].parent / "trained" / "model.safetensors"))
    assert set(column(browser, 0, shown=True)) == names
    browser.click("input[type=search]")
    browser.type("LAYERS.3 q_proj")
    assert column(browser, 0, shown=True) == ["model.layers.3.self_attn.q_proj.weight"]
    browser.value("document.querySelector('input').select()")
    browser.type("onclick")
    assert column(browser, 0, shown=True) == [EVIL]
    assert browser.value("document.querySelector('[onclick]')") is None


@pytest.mark.parametrize("search", ["", "nothing has this name"])
@pytest.mark.parametrize("width", [PHONE, WIDE])
@pytest.mark.parametrize("page", ["diagnose", "verify", "statistics"])
def test_a_cell_of_a_map_leads_to_the_row_of_its_tensor(
    page: str, width: int, search: str, browser: Browser, pages: dict[str, Path]
) -> None:
    browser.open(pages[page], width=width)
    if search:
        browser.click("input[type=search]")
        browser.type(search)
        assert column(browser, 0, shown=True) == []
    name = "model.layers.7.self_attn.q_proj.weight"
    found = f"[...document.querySelectorAll('rect')].find(r => r.textContent.startsWith({json.dumps(name)}))"
    browser.value(f"{found}.id = 'cell'")
    browser.click("#cell")
    browser.value("new Promise(done => requestAnimationFrame(() => setTimeout(done)))")
    shown = "document.querySelector('tr:target')"
    assert browser.value(f"{shown}.cells[0].textContent") == name
    inside = f"(r => [r.top >= 0, r.bottom <= innerHeight, r.height > 0])({shown}.getBoundingClientRect())"
    assert browser.value(inside) == [True, True, True]


def test_the_code_of_a_finding_leads_to_its_explanation(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["diagnose"], width=PHONE)
    browser.click(".finding a")
    code = browser.value("document.querySelector('.finding a').textContent")
    assert code in browser.value("document.querySelector('.explanation:target').innerText")


def test_a_page_can_be_read_by_somebody_who_allows_no_programs(browser: Browser, pages: dict[str, Path]) -> None:
    browser.ask("Emulation.setScriptExecutionDisabled", value=True)
    browser.open(pages["verify"], width=PHONE)
    try:
        assert EVIL in column(browser, 0, shown=True)
    finally:
        browser.ask("Emulation.setScriptExecutionDisabled", value=False)
