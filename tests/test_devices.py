"""The package is for any accelerator and any default device: it names no make, and says where its tensors are."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("shardsmith", "hooks", "integrations")
MAKES = frozenset({"cuda", "xpu", "mps", "hpu", "npu", "mtia", "musa"})


FACTORIES = frozenset(
    {"empty", "zeros", "ones", "full", "tensor", "arange", "linspace", "eye", "rand", "randn", "randint", "randperm"}
)


def source_files() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def named_makes(tree: ast.AST) -> Iterator[str]:
    """What names one make: ``torch.cuda``, an import of it, and a device in a string, such as ``"cuda:0"``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            found = node.attr if node.attr in MAKES else None
        elif isinstance(node, ast.ImportFrom):
            parts = {*(node.module or "").split("."), *(alias.name for alias in node.names)}
            found = next(iter(parts & MAKES), None) if (node.module or "").startswith("torch") else None
        elif isinstance(node, ast.Import):
            found = next(
                (a.name for a in node.names if a.name.startswith("torch.") and {*a.name.split(".")} & MAKES), None
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found = node.value if node.value.split(":")[0] in MAKES and " " not in node.value else None
        else:
            found = None
        if found is not None:
            yield f"line {getattr(node, 'lineno', '?')}: {found}"


def test_no_make_of_accelerator_is_named() -> None:
    files = source_files()
    assert len(files) > 100
    assert {path: made for path in files if (made := [*named_makes(ast.parse(path.read_text()))])} == {}


def made_anywhere(tree: ast.AST) -> Iterator[str]:
    """Tensors that are made wherever ``torch.set_default_device`` says."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        is_factory = ast.unparse(node.func.value) == "torch" and node.func.attr in FACTORIES
        if is_factory and not any(keyword.arg in ("device", None) for keyword in node.keywords):
            yield f"line {node.lineno}: {ast.unparse(node)}"


def test_no_tensor_is_made_wherever_the_default_device_is() -> None:
    found = {path: made for path in source_files() if (made := [*made_anywhere(ast.parse(path.read_text()))])}
    assert found == {}
    assert [*made_anywhere(ast.parse("torch.empty(3, dtype=x)"))]


@pytest.mark.parametrize(
    "code",
    [
        "torch.cuda.synchronize()",
        "import torch.cuda",
        "from torch import cuda",
        "from torch.cuda import Stream",
        "x.to('cuda:0')",
        "torch.xpu.empty_cache()",
    ],
)
def test_every_way_to_name_one_is_seen(code: str) -> None:
    assert [*named_makes(ast.parse(code))]
