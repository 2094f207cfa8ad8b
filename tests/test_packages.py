"""The rules of the house that a machine can check."""

from __future__ import annotations

import ast
import importlib
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import shardsmith
import shardsmith.errors

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/**/*.md", "examples/**/*.*")
    for path in ROOT.glob(pattern)
    if path.suffix in (".md", ".py", ".toml", ".sh")
)
PUBLIC = re.compile(r"shardsmith\.(cli|errors|hooks|name_maps|integrations(\..*)?)$")
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


OPTIONAL = {
    "accelerate",
    "diffusers",
    "lightning",
    "obstore",
    "opentelemetry",
    "peft",
    "torch_checkpointing",
    "torchdata",
    "torchtitan",
    "transformers",
}
OPTIONAL |= {"fsspec", "huggingface_hub", "tokenizers", "tensorboard"}  # which come with others
"""What is imported only where a user has it."""


def test_what_is_required_is_imported_and_what_is_imported_is_required() -> None:
    lines = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    required = {re.match(r"[A-Za-z0-9_-]+", line)[0] for line in lines}  # type: ignore[index]
    required = {{"markdown-it-py": "markdown_it"}.get(name, name) for name in required}
    imported = {
        module.split(".")[0] for folder in MAY_IMPORT for path in files_of(folder) for module in imports_of(path)
    }
    foreign = imported - set(sys.stdlib_module_names) - {"shardsmith"}
    assert required <= foreign
    assert foreign - OPTIONAL == required


def files_of(folder: str) -> list[Path]:
    return list((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_go_downward_only(folder: str) -> None:
    upper = {"shardsmith.hooks", "shardsmith.integrations"} - set(MAY_IMPORT[folder])
    for path in (ROOT / folder).rglob("*.py"):
        wrong = {module for module in imports_of(path) for top in upper if (module + ".").startswith(top + ".")}
        assert not wrong, f"{path} imports {wrong}"


@pytest.mark.parametrize("package", ["shardsmith", "shardsmith.hooks", "shardsmith.name_maps"])
def test_a_package_exports_all_that_it_has(package: str) -> None:
    module = importlib.import_module(package)
    values = {name: getattr(module, name) for name in module.__all__}  # of lazy names, too
    kept = {"TYPE_CHECKING", "Any", "annotations"}
    others = {name for name, value in vars(module).items() if not isinstance(value, ModuleType)} - kept
    assert {name for name in others if not name.startswith("_")} == values.keys() - {"__version__"}


def test_lazy_names_are_those_that_a_type_checker_sees() -> None:
    """Each name of the front door comes from the module that the imports for type checkers name."""
    imported = [
        (alias.asname or alias.name, getattr(importlib.import_module(node.module or ""), alias.name))
        for node in ast.walk(ast.parse((ROOT / "shardsmith" / "__init__.py").read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("shardsmith.")
        for alias in node.names
    ]
    assert {name for name, _ in imported} == set(shardsmith.__all__) - {"__version__"}
    assert [name for name, value in imported if getattr(shardsmith, name) is not value] == []


def test_every_error_is_at_the_front_door() -> None:
    own = {name for name, value in vars(shardsmith.errors).items() if isinstance(value, type) and name[0] != "_"}
    assert {name for name in own if name.endswith("Error")} <= set(shardsmith.__all__)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_name_public_modules_only(document: str) -> None:
    """Every module that a document imports or names by its path is public; any other may move."""
    text = (ROOT / document).read_text()
    named = re.findall(r"(?<![\w/.-])shardsmith((?:\.[a-zA-Z_]\w*)+)", text)
    modules = {module for path in named for module in _modules_in(path)}
    assert [module for module in sorted(modules) if not PUBLIC.match(module)] == []


def _modules_in(path: str) -> list[str]:
    """Those prefixes of ``.a.b.Name`` that are modules of the package."""
    parts = path.split(".")[1:]
    found = []
    for end in range(1, len(parts) + 1):
        module = ".".join(["shardsmith", *parts[:end]])
        file = ROOT.joinpath(*module.split("."))
        if not (file.with_suffix(".py").is_file() or (file / "__init__.py").is_file()):
            break
        found.append(module)
    return found


def test_the_core_imports_no_trainer_and_transformers_only_when_it_is_needed() -> None:
    for path in (ROOT / "shardsmith").rglob("*.py"):
        tops = {module.split(".")[0] for module in imports_of(path)}
        assert not tops & {"accelerate", "torchtitan"}, path
        at_import = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert "transformers" not in {name.split(".")[0] for node in at_import for name in modules_of(node)}, path
