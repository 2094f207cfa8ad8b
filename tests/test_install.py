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


@pytest.mark.long
@pytest.mark.parametrize("options", [["."], ["--editable", "."]], ids=["regular", "editable"])
def test_the_package_installs_under_one_name(tmp_path: Path, options: list[str]) -> None:
    source, python = copy_of_the_source(tmp_path), new_environment(tmp_path)
    install(source, python, options)
    code = "import shardsmith.hooks as h, shardsmith.integrations as i; print(h.ShardedSave.__module__, h.__file__)"
    module, file = subprocess.check_output([python, "-c", code], text=True, cwd=tmp_path).split()
    assert module == "shardsmith.hooks.save"
    expected = source / "hooks" if "--editable" in options else python.parent.parent / "lib"
    assert Path(file).resolve().is_relative_to(expected)
    if "--editable" not in options:
        assert python_files(Path(file).parent.parent) == python_files(ROOT / "shardsmith")
    # In a clone, the folder shardsmith/ hides the installed package: it must be complete by itself.
    module, file = subprocess.check_output([python, "-c", code], text=True, cwd=source).split()
    assert (module, Path(file).resolve()) == ("shardsmith.hooks.save", source / "hooks" / "__init__.py")
    assert b"to-hf" in subprocess.check_output([python.parent / "shardsmith", "--help"])


@pytest.mark.long
def test_a_newcomer_gets_from_the_package_to_a_page_of_the_run(tmp_path: Path) -> None:
    python = new_environment(tmp_path)
    install(copy_of_the_source(tmp_path), python, ["."])
    (tmp_path / "new").mkdir()
    follow(ROOT / "docs" / "tutorial.md", tmp_path / "new", python)


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


def install(source: Path, python: Path, options: list[str]) -> None:
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-build-isolation", *options], check=True, cwd=source)


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
