"""The pages of verify, inspect and diagnose: complete, escaped, standing on their own."""

from __future__ import annotations

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shardsmith.cli import main
from shardsmith.compare.codes import CODES
from shardsmith.compare.values import compare_sources
from shardsmith.formats.safetensors_files.source import SafetensorsSource
from shardsmith.reports.explanations import explanations
from tests.trained_runs import build

CHANGED = "model.layers.1.mlp.up_proj.weight"
EVIL = 'model.layers.0.<b onclick="x">&.weight'


class Page(HTMLParser):
    """What a browser makes of a page, as far as the tests ask."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: dict[str, str] = {}
        self.rows: set[str] = set()
        self.elsewhere: list[str] = []
        self.tags: set[str] = set()
        self.words = ""
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.tags.add(tag)
        if tag not in ("meta", "br", "input"):
            self.open.append(tag)
        if tag == "rect":
            self.fill = found["fill"]
        if tag == "tr" and "id" in found:
            self.rows.add(found["id"])
        self.elsewhere += [value for name in ("src", "href") if not (value := found.get(name, "#")).startswith("#")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data
        if self.open[-2:] == ["rect", "title"]:
            self.cells[data.split(": ")[0]] = self.fill


def saved_model(directory: Path) -> Path:
    build("llama").save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and the same with one tensor changed and one more, whose name is hostile."""
    place = tmp_path_factory.mktemp("pair")
    base = saved_model(place / "base")
    other = shutil.copytree(base, place / "other")
    state = load_file(base / "model.safetensors")
    state[CHANGED] = state[CHANGED] * 1.5
    save_file({**state, EVIL: torch.zeros(2)}, other / "model.safetensors")
    return base, other


def test_verify_writes_a_map_and_a_table_of_all_tensors(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, other = pair
    assert main(["verify", str(other), str(base), "--html", str(tmp_path / "page.html")]) == 1
    page = Page(tmp_path / "page.html")
    names = load_file(other / "model.safetensors").keys()
    assert page.cells.keys() == names
    assert len(page.rows) == len(names)
    equal = {colour for name, colour in page.cells.items() if name not in (CHANGED, EVIL)}
    assert len(equal) == 1
    assert len({page.cells[CHANGED], page.cells[EVIL], *equal}) == 3
    assert f"2 of {len(names)} tensors differ" in page.words


@pytest.mark.parametrize("command", ["verify", "inspect", "inspect --statistics", "diagnose"])
def test_a_page_stands_on_its_own_and_shows_hostile_names_as_text(
    command: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    base, other = pair
    name, *options = command.split()
    places = {
        "verify": [str(other), str(base)],
        "inspect": [str(other)],
        "diagnose": ["--checkpoint", str(other), "--base-model", str(base), "--level", "values"],
    }
    main([name, *places[name], *options, "--html", str(tmp_path / "page.html")])
    page = Page(tmp_path / "page.html")
    assert page.elsewhere == []
    assert EVIL in page.words
    assert "b" not in page.tags or name == "diagnose"
    assert "shardsmith " + name in page.words


def test_diagnose_counts_the_tensors_and_fills_in_its_commands(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, other = pair
    arguments = ["--checkpoint", str(other), "--base-model", str(base), "--level", "values"]
    assert main(["diagnose", *arguments, "--html", str(tmp_path / "page.html")]) == 1
    page = Page(tmp_path / "page.html")
    assert f"in 1 of {len(load_file(base / 'model.safetensors'))} tensors" in page.words
    assert f"--base-model {base}" in page.words
    assert "MODEL" not in page.words


def test_the_page_of_a_run_shows_what_its_events_say(tmp_path: Path) -> None:
    run = tmp_path / "run"
    saved_model(run / "hf" / "step-3")
    event = {"kind": "export", "step": 3, "path": str(run / "hf" / "step-3"), "seconds": 2.5, "seconds_waited": 0.125}
    events = [
        {**event, "nbytes": 5, "ranks": 2, "error": None},
        {**event, "kind": "save", "nbytes": 5, "ranks": 2, "error": None, "ema_distance": 0.0625},
        {**event, "step": 4, "nbytes": 0, "ranks": 2, "error": "OSError: <disk> full"},
    ]
    lines = [
        *map(json.dumps, events),
        json.dumps({**event, "nbytes": 5, "ranks": 2, "error": None, "seconds": math.inf}),
    ]
    lines += ['{"kind": "export", "st']  # cut off by a kill
    (run / "events.jsonl").write_text("\n".join(lines))
    assert main(["inspect", str(run), "--html", str(run / "page.html")]) == 0
    page = Page(run / "page.html")
    assert "OSError: <disk> full" in page.words
    assert "step 3: 0.125 s" in page.words
    assert "step 3: 0.0625" in page.words
    assert page.rows == {"s0", "e0", "e1", "e2"}


def test_a_page_never_takes_the_place_of_what_it_is_about(pair: tuple[Path, Path]) -> None:
    base, _ = pair
    before = (base / "model.safetensors").read_bytes()
    assert main(["inspect", str(base), "--html", str(base / "model.safetensors")]) == 2
    assert main(["verify", str(base), str(base), "--html", str(base / "page.html")]) == 2
    assert (base / "model.safetensors").read_bytes() == before
    assert not (base / "page.html").exists()


def test_codes_are_links_where_the_package_says_where_its_documentation_is() -> None:
    assert "href" not in "".join(explanations(["not-finite"], []))
    linked = explanations(["not-finite"], ["Source, https://a.example", "Documentation, https://d.example/docs/"])
    assert 'href="https://d.example/docs/troubleshooting/#not-finite"' in "".join(linked)


def test_each_code_leads_to_its_explanation_in_the_page(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, other = pair
    arguments = ["--checkpoint", str(other), "--base-model", str(base), "--level", "values"]
    main(["diagnose", *arguments, "--html", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    codes = set(re.findall(r'href="#code-([^"]+)"', page))
    assert codes
    assert codes == set(re.findall(r'id="code-([^"]+)"', page))
    documented = (Path(__file__).parents[2] / "docs" / "troubleshooting.md").read_text()
    for code in codes:
        first = documented.split(f"### `{code}`\n\n")[1].split("\n")[0]
        assert re.sub(r"[`*\[\]]", "", first)[:20] in Page(tmp_path / "page.html").words


def test_every_code_has_an_explanation() -> None:
    for code in CODES:
        (_, explained) = explanations([code], [])
        assert "<p>" in explained, code
        assert "<p>The same" not in explained, f"{code}: it is read alone"
        assert "](" not in explained, code


@pytest.mark.parametrize("change", [1.0, 1.0 + 2**-20, 1.5, 0.0])
def test_the_relative_difference_is_that_of_the_formula(change: float, tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {"w": torch.randn(300, 700)}
    save_file(tensors, tmp_path / "right.safetensors")
    left = {"w": tensors["w"] * change}
    save_file(left, tmp_path / "left.safetensors")
    sources = [SafetensorsSource(tmp_path / f"{side}.safetensors") for side in ("left", "right")]
    (found,) = compare_sources(*sources, ["w"]).values()
    difference = (left["w"].double() - tensors["w"].double()).norm() / tensors["w"].double().norm()
    relative = found.distance.relative if found.distance else 0.0
    assert relative == pytest.approx(float(difference), rel=1e-4)


def test_verify_sorts_by_effect_counts_layers_and_hints_at_rounding(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, _ = pair
    state = load_file(base / "model.safetensors")
    far = shutil.copytree(base, tmp_path / "far")
    other = "model.layers.0.mlp.up_proj.weight"
    save_file({**state, other: state[other] * 1.01, CHANGED: state[CHANGED] * 2}, far / "model.safetensors")
    assert main(["verify", str(far), str(base)]) == 1
    told = capsys.readouterr().out
    assert told.index(f"{CHANGED}: values") < told.index(f"{other}: values")
    assert "model.layers.1: 1 tensor, by up to 1\n" in told
    assert "--rounding" not in told
    cast = shutil.copytree(base, tmp_path / "cast")
    save_file({name: value.bfloat16() for name, value in state.items()}, cast / "model.safetensors")
    assert main(["verify", str(cast), str(base)]) == 1
    assert "--rounding" in capsys.readouterr().out
    assert main(["verify", str(cast), str(base), "--rounding"]) == 0
