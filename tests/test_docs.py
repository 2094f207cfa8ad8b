"""What the documents show works as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from shardsmith.compare.codes import CODES
from shardsmith.hooks import HFExport, every
from shardsmith.load.faults import EFFECTS
from shardsmith.tensors.digest import digest_tensor
from tests.followed import follow
from tests.forked import run_python
from tests.planted_faults import PLANTED

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def documented() -> dict[str, Any]:
    """What the examples on name maps define."""
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", (DOCS / "extending.md").read_text(), re.DOTALL):
        if "targets(self, specs)" in code:
            exec(code, names)
    return names


def exported(model: nn.Module, names: Any, directory: Path) -> dict[str, Tensor]:
    export = HFExport(directory, model=model, when=every(1), dtype="float32", names=names)
    export.export(1)
    export.close()
    return load_file(directory / "step-1" / "model.safetensors")


def test_the_name_map_of_the_documents_takes_a_tensor_apart(documented: dict[str, Any], tmp_path: Path) -> None:
    model = nn.ModuleDict({"qkv": nn.Linear(4, 9, bias=False), "out": nn.Linear(3, 4)})
    found = exported(model, documented["ApartInFiles"](), tmp_path)
    assert sorted(found) == ["k_proj.weight", "out.bias", "out.weight", "q_proj.weight", "v_proj.weight"]
    joined = torch.cat([found[f"{part}_proj.weight"] for part in "qkv"])
    assert torch.equal(joined, model["qkv"].weight)


def test_the_name_map_of_the_documents_brings_values_into_another_order(
    documented: dict[str, Any], tmp_path: Path
) -> None:
    model = nn.ModuleDict({"patch_embedding": nn.Conv2d(3, 8, 4), "q_proj": nn.Linear(6, 16, bias=False)})
    found = exported(model, documented["AnotherOrder"](heads=2), tmp_path)
    patches = torch.randn(5, 3, 4, 4)
    as_linear = patches.permute(0, 2, 3, 1).reshape(5, -1) @ found["patch_embedding.weight"].T
    expected = model["patch_embedding"](patches).view(5, 8) - model["patch_embedding"].bias
    assert torch.allclose(as_linear, expected, atol=1e-5)
    halves = found["q_proj.weight"].view(2, 2, 4, 6)
    assert torch.equal(torch.stack([halves[:, 0], halves[:, 1]], dim=2).reshape(16, 6), model["q_proj"].weight)


def test_the_digest_of_the_documents_is_the_digest() -> None:
    (digest,) = re.findall(r"digest is `([0-9a-f]{32})`", (DOCS / "format.md").read_text().replace("\n", " "))
    assert str(digest_tensor(torch.tensor([1.0, 2.0]))) == digest


def test_every_code_of_a_finding_is_a_heading_and_every_heading_a_code() -> None:
    headings = re.findall(r"^### `(.+)`$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(headings) == len(set(headings))
    assert set(headings) == CODES.keys() | EFFECTS.keys()


def test_every_planted_fault_is_in_the_published_table() -> None:
    table = re.findall(r"^\|.*\| `(.+)` \|$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert {planted.code for planted in PLANTED} - {"not-finite"} <= set(table)


def test_every_planted_fault_has_an_example_of_what_is_printed() -> None:
    sections = re.split(r"^## ", (DOCS / "diagnose_examples.md").read_text(), flags=re.MULTILINE)[1:]
    shown = {match[1]: section for section in sections if (match := re.match(r"`(.+?)`", section))}
    assert {planted.code for planted in PLANTED} <= shown.keys()
    assert all(re.search(rf"^(error|warning) +{code}$", section, re.MULTILINE) for code, section in shown.items())


def test_the_program_of_the_readme_runs_as_it_is(tmp_path: Path) -> None:
    follow(DOCS.parent / "README.md", tmp_path, sys.executable)  # the tutorial: tests/test_install.py


def test_the_page_by_task_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=16)).save_pretrained("assets/base")
    names: dict[str, Any] = {}
    seen: set[str] = set()  # the first of each command starts a new interpreter
    for language, code in re.findall(r"```(python|bash)\n(.*?)```", (DOCS / "howto.md").read_text(), re.DOTALL):
        if language == "python":
            exec(code, names)
        for command in code.splitlines() if language == "bash" else ():
            arguments = ["-m", *command.split()]
            if arguments[2] in seen:
                done = run_python(*arguments)
            else:
                done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            seen.add(arguments[2])
    assert names["step"] == 40
    assert sorted(os.listdir("run/exports")) == [f"step-{step}" for step in (10, 20, 30, 40)]
    assert [step for step, values in names["numbers"] if "checkpoint/save/seconds" in values] == [50]


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    text = (DOCS.parent / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert max(len(line) for line in text.splitlines()) <= 120
    assert [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not (DOCS.parent / link).exists()] == []


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    pages = re.findall(r": (\S+\.md)$", (DOCS.parent / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(pages) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))
