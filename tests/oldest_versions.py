"""The lowest versions of what we build on that pyproject.toml accepts, as arguments of pip, for `make test-oldest`."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

PACKAGES = ("torch", "safetensors", "transformers", "accelerate")


def oldest_versions() -> list[str]:
    """``["torch==2.11.0", ...]``."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    found = {}
    for line in lines:
        if match := re.match(r"(?P<name>[a-z]+)>=(?P<version>[0-9.]+)", line):
            found.setdefault(match["name"], match["version"])
    return [f"{name}=={'.'.join([*found[name].split('.'), '0', '0'][:3])}" for name in PACKAGES]


if __name__ == "__main__":
    print(*oldest_versions())
