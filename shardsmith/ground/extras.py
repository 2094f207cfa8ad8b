"""Optional packages: the command that installs one, where it turns out to be missing."""

from __future__ import annotations

EXTRAS = {
    "transformers": "transformers",
    "huggingface_hub": "transformers",
    "accelerate": "accelerate",
    "lightning": "lightning",
    "torchtitan": "torchtitan",
    "obstore": "remote",
}
"""Name of an importable package -> the extra of ours that installs it."""


def install_hint(error: ModuleNotFoundError) -> str | None:
    """Return a sentence with the command that installs a missing package; None for a package of no extra."""
    package = (error.name or "").split(".")[0]
    if package not in EXTRAS:
        return None
    return f"{package} is not installed; run: {install_line(package)}"


def install_line(*packages: str) -> str:
    """Return the command that installs packages, with the extras of ours that bring them."""
    extras = dict.fromkeys(EXTRAS[package] for package in packages if package in EXTRAS)
    others = [package for package in packages if package not in EXTRAS]
    return " ".join(["pip install", *([f"'shardsmith[{','.join(extras)}]'"] if extras else []), *others])


def describe_failure(error: Exception) -> str:
    """Return the type and text of an exception of another package, or how to install that package."""
    hint = install_hint(error) if isinstance(error, ModuleNotFoundError) else None
    return hint or f"{type(error).__name__}: {error}"


def missing_package(error: ModuleNotFoundError) -> ModuleNotFoundError:
    """Return the error with the command that installs the package, if it is that of an extra."""
    hint = install_hint(error)
    return error if hint is None else ModuleNotFoundError(hint, name=error.name, path=error.path)
