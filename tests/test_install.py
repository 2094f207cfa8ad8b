"""hooks/ and integrations/ stand at the top of the repository and install under the one import name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.followed import follow

ROOT = Path(__file__).parent.parent
PARTS = ("pyproject.toml", "setup.cfg", "README.md", "LICENSE", "shardsmith", "hooks", "integrations")


@pytest.fixture(scope="module")
def regular(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A copy of the source, and Python of an environment in which it is installed. Read only."""
    return install(tmp_path_factory.mktemp("regular"), ".")


@pytest.fixture(scope="module")
def editable(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same, installed in place."""
    return install(tmp_path_factory.mktemp("editable"), "--editable", ".")


@pytest.mark.long
@pytest.mark.parametrize("kind", ["regular", "editable"])
def test_the_package_installs_under_one_name(request: pytest.FixtureRequest, tmp_path: Path, kind: str) -> None:
    source, python = request.getfixturevalue(kind)
    code = "import shardsmith.hooks as h, shardsmith.integrations as i; print(h.ShardedSave.__module__, h.__file__)"
    module, file = subprocess.check_output([python, "-c", code], text=True, cwd=tmp_path).split()
    assert module == "shardsmith.hooks.save"
    expected = source / "hooks" if kind == "editable" else python.parent.parent / "lib"
    assert Path(file).resolve().is_relative_to(expected)
    if kind == "regular":
        assert python_files(Path(file).parent.parent) == python_files(ROOT / "shardsmith")
    # In a clone, the folder shardsmith/ hides the installed package: it must be complete by itself.
    module, file = subprocess.check_output([python, "-c", code], text=True, cwd=source).split()
    assert (module, Path(file).resolve()) == ("shardsmith.hooks.save", source / "hooks" / "__init__.py")
    assert b"to-hf" in subprocess.check_output([python.parent / "shardsmith", "--help"])


@pytest.mark.long
def test_a_newcomer_gets_from_the_package_to_a_page_of_the_run(regular: tuple[Path, Path], tmp_path: Path) -> None:
    _, python = regular
    follow(ROOT / "docs" / "tutorial.md", tmp_path, python)


def test_a_clone_that_is_not_installed_saves(tmp_path: Path) -> None:
    (tmp_path / "others").mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "shardsmith" not in entry.name:
            (tmp_path / "others" / entry.name).symlink_to(entry)
    code = (
        "import torch; from shardsmith.hooks import ShardedSave, at\n"
        "save = ShardedSave('saves', model=torch.nn.Linear(2, 2), when=at(10**9)); save.save(1); save.close()"
    )
    source = copy_of_the_source(tmp_path)
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "others")}
    subprocess.run([sys.executable, "-S", "-c", code], check=True, cwd=source, env=environment)
    assert (source / "saves" / "step-1" / "metadata.json").exists()


def install(folder: Path, *options: str) -> tuple[Path, Path]:
    source, python = copy_of_the_source(folder), new_environment(folder)
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-build-isolation", *options], check=True, cwd=source)
    return source, python


def python_files(folder: Path) -> set[str]:
    """Also below links to folders."""
    return {
        os.path.relpath(os.path.join(place, name), folder)
        for place, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.endswith(".py")
    }


def copy_of_the_source(folder: Path) -> Path:
    """So that a build leaves nothing in the working tree."""
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(
                ROOT / part, folder / "source" / part, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            (folder / "source").mkdir(exist_ok=True)
            shutil.copy(ROOT / part, folder / "source")
    return folder / "source"


def new_environment(folder: Path) -> Path:
    """Python of an environment that sees what this one has installed, except editable packages like ours."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], check=True)
    python = folder / "env" / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.check_output([python, "-c", code], text=True).strip())
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python
