"""The rules of the house that a machine can check."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "shardsmith": (),
    "hooks": ("shardsmith.hooks",),
    "integrations": ("shardsmith.hooks", "shardsmith.integrations"),
}


def imports_of(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return modules | {
        node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level
    }


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_go_downward_only(folder: str) -> None:
    upper = {"shardsmith.hooks", "shardsmith.integrations"} - set(MAY_IMPORT[folder])
    for path in (ROOT / folder).rglob("*.py"):
        wrong = {module for module in imports_of(path) for top in upper if (module + ".").startswith(top + ".")}
        assert not wrong, f"{path} imports {wrong}"


@pytest.mark.parametrize("package", ["shardsmith", "shardsmith.hooks", "shardsmith.integrations"])
def test_what_a_package_exports_is_sorted_and_there(package: str) -> None:
    module = importlib.import_module(package)
    exported = getattr(module, "__all__", [])
    assert exported == sorted(exported)
    assert all(hasattr(module, name) for name in exported)


def test_the_core_imports_no_trainer() -> None:
    trainers = ("transformers", "accelerate", "torchtitan")
    for path in (ROOT / "shardsmith").rglob("*.py"):
        assert not {module for module in imports_of(path) if module.split(".")[0] in trainers}, path
