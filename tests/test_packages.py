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


def modules_of(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    return {node.module} if isinstance(node, ast.ImportFrom) and node.module and not node.level else set()


def imports_of(path: Path) -> set[str]:
    """Everything that a file imports, anywhere in it."""
    return {module for node in ast.walk(ast.parse(path.read_text())) for module in modules_of(node)}


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


def test_the_core_imports_no_trainer_and_transformers_only_when_it_is_needed() -> None:
    for path in (ROOT / "shardsmith").rglob("*.py"):
        tops = {module.split(".")[0] for module in imports_of(path)}
        assert not tops & {"accelerate", "torchtitan"}, path
        at_import = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert "transformers" not in {name.split(".")[0] for node in at_import for name in modules_of(node)}, path
