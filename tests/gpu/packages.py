"""What the tests import besides torch, where a machine without a network does not have it: from a folder of wheels.

python -m tests.gpu.packages FOLDER    collect the wheels, on a machine with a network (``make gpu-wheels``)
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
WHEELS = ROOT / "gpu-wheels"
MOST_BYTES = 64 << 20
"""What a folder of wheels may take: it travels together with the repository."""
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
_PYTHON = "3.12"


def required() -> list[str]:
    """What pyproject.toml asks for, of the package and of its models, and what runs the tests.

    Without torch, which is there, and accelerate, which would bring another one along.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    runners = [line for line in extras["dev"] if line.startswith("pytest")]
    wanted = [*project["dependencies"], *extras["transformers"], *runners]
    return [line for line in wanted if _name(line) not in ("torch", "accelerate")]


def collect(folder: Path) -> int:
    """Download the wheels of everything that is required, of what that requires, too; their size in bytes."""
    platforms = [option for name in _PLATFORMS for option in ("--platform", name)]
    target = ["--only-binary=:all:", "--python-version", _PYTHON, "--implementation", "cp", *platforms]
    wanted = [line.split(";")[0].strip() for line in required()]  # pip would read the markers for this machine
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *target, "--dest", str(folder), *wanted], check=True)
    return sum(path.stat().st_size for path in folder.glob("*.whl"))


def make_importable() -> None:
    """Make everything importable in this process that is in the folder of wheels, if there is one.

    What the machine has itself comes first: of the wheels only what it lacks is taken.
    """
    if WHEELS.is_dir() and str(_unpacked()) not in sys.path:
        sys.path.append(str(_unpacked()))


def _unpacked() -> Path:
    """Where the wheels are unpacked; done once. None of them has anything but importable files."""
    target = WHEELS / "unpacked"
    if not target.is_dir():
        with tempfile.TemporaryDirectory(dir=WHEELS) as folder:
            for wheel in sorted(WHEELS.glob("*.whl")):
                with zipfile.ZipFile(wheel) as archive:
                    archive.extractall(folder)
            with contextlib.suppress(OSError):  # another process was faster, with the same files
                os.rename(folder, target)
            Path(folder).mkdir(exist_ok=True)  # for the context manager to remove
    return target


def _name(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9_.-]", requirement, maxsplit=1)[0].lower()


if __name__ == "__main__":
    size = collect(Path(sys.argv[1]))
    print(f"{sys.argv[1]}: {size / (1 << 20):.1f} MiB of wheels for Python {_PYTHON} on Linux, x86-64")
    if size > MOST_BYTES:
        sys.exit(f"that is more than {MOST_BYTES >> 20} MiB")
