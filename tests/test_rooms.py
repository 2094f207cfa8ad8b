"""Rooms of the core import only rooms above them in this list, in every form that Python has for an import."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = [
    "errors",
    "ground",
    "tensors",
    "checking",
    "manifest",
    "sharding",
    "name_maps",
    "formats",
    "hf",
    "inspection",
    "overview",
    "tensor_listing",
    "compare",
    "reports",
    "conversion",
    "load",
    "live",
    "run_state",
    "export",
    "diagnose",
    "watch",
    "manager",
    "commands",
    "cli",
    "__main__",
    "hooks",
    "integrations",
]
"""Folders and files right below ``shardsmith/``, the lowest first."""


def imports_of(tree: ast.AST, package: str) -> Iterator[str]:
    """Dotted names of all that a module imports, at any depth; relative ones made absolute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def rooms_of(names: Iterator[str]) -> set[str]:
    parts = [name.split(".") for name in names if name.startswith("shardsmith.")]
    return {part[1] for part in parts if part[1] in ORDER}


def files_of(room: str) -> list[Path]:
    folder = ROOT / "shardsmith" / room
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


@pytest.mark.parametrize("room", ORDER)
def test_a_room_imports_only_lower_rooms(room: str) -> None:
    for file in files_of(room):
        package = ".".join(file.parent.relative_to(ROOT).parts)
        found = rooms_of(imports_of(ast.parse(file.read_text()), package))
        assert not {other for other in found if ORDER.index(other) > ORDER.index(room)}, file


def test_every_room_has_its_place_in_the_order() -> None:
    core = ROOT / "shardsmith"
    found = {path.stem for path in core.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert found - {"__init__"} == set(ORDER)


@pytest.mark.parametrize(
    "line",
    [
        "import shardsmith.hooks.base",
        "import shardsmith.hooks as h",
        "from shardsmith import hooks",
        "from shardsmith.hooks import EMA",
        "from .. import hooks",
        "from ..hooks import EMA",
        "from ..hooks.base import Hook as H",
        "def f():\n    from ..hooks import EMA",
        "if True:\n    from shardsmith import errors, hooks",
    ],
)
def test_every_form_of_an_import_is_seen(line: str) -> None:
    assert "hooks" in rooms_of(imports_of(ast.parse(line), "shardsmith.ground"))
