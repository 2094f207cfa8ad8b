"""What the documents show works as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from shardsmith.diagnose.codes import CODES
from shardsmith.digest import digest_tensor
from shardsmith.hooks import HFExport, every
from shardsmith.load_faults import EFFECTS
from tests.planted_faults import PLANTED

DOCS = Path(__file__).parent.parent / "docs"


def test_the_name_map_of_the_documents_takes_a_tensor_apart(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "extending.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    model = nn.ModuleDict({"qkv": nn.Linear(4, 9, bias=False), "out": nn.Linear(3, 4)})
    export = HFExport(tmp_path, model=model, when=every(1), dtype="float32", names=names["ApartInFiles"]())
    export.export(1)
    export.close()
    found = load_file(tmp_path / "step-1" / "model.safetensors")
    assert sorted(found) == ["k_proj.weight", "out.bias", "out.weight", "q_proj.weight", "v_proj.weight"]
    joined = torch.cat([found[f"{part}_proj.weight"] for part in "qkv"])
    assert torch.equal(joined, model["qkv"].weight)


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
