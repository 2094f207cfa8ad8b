"""The Python files that a model comes with: what its configs name in ``auto_map``, and what these files import.

They are copied, as ``save_pretrained`` copies them, and never run here: a directory whose config names code that is not
there cannot be loaded by anyone. Loaders run it only with ``trust_remote_code=True``.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from shardsmith.errors import CheckpointError, MismatchError
from shardsmith.ground.bounded import read_bounded
from shardsmith.hf.config_fit import ConfigFit
from shardsmith.manifest.metadata import read_json

_CONFIGS = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
_MOST_BYTES = 1 << 24
_TARGET = re.compile(r"\w[\w-]*(\.\w[\w-]*)+")
# ``from .parts import x``, ``import .parts``, ``from . import parts``: as transformers looks for them, and the last.
_IMPORTS = re.compile(r"^\s*(?:from\s+\.(\w[\w.]*)\s+import|import\s+\.(\w[\w.]*)|from\s+\.\s+import\s+(\w+))", re.M)


def named_code(config: Mapping[str, Any]) -> list[str]:
    """Return the Python files that a config names, of those that belong beside it."""
    named = config.get("auto_map")
    values = named.values() if isinstance(named, Mapping) else ()
    # A tokenizer has two in a list, of which one may be null. "org/name--module.Class" is not in the directory.
    targets = [one for value in values for one in (value if isinstance(value, list | tuple) else [value])]
    # Plain names only: a path might lead out of the directory.
    local = [one for one in targets if isinstance(one, str) and "--" not in one and _TARGET.fullmatch(one)]
    return list(dict.fromkeys(f"{target.rpartition('.')[0].replace('.', '/')}.py" for target in local))


def code_beside(base: Path) -> set[str]:
    """Return the Python files of a base that its configs name, with all that these import from beside them."""
    return _with_imports(base, [name for file in _CONFIGS for name in _named_in(base / file)])


def code_of_model(model: Any) -> tuple[dict[str, str], dict[str, Path]]:
    """Return what ``save_pretrained`` does about code for a live model of transformers: ``auto_map``, and its files.

    Both are empty for a class of the library, and for one that was defined in ``__main__``, as there.
    """
    from shardsmith.tensors.fqn import own_class  # which imports what only a live model needs

    auto_map: dict[str, str] = {}
    files: dict[str, Path] = {}
    for kind in (own_class(model), type(getattr(model, "config", None))):
        auto_class, module = getattr(kind, "_auto_class", None), sys.modules.get(kind.__module__)
        source = getattr(module, "__file__", None)
        if auto_class is None or source is None or kind.__module__ == "__main__":
            continue
        place = Path(source)
        auto_map[str(auto_class)] = f"{place.stem}.{kind.__name__}"
        files |= {name: place.parent / name for name in _with_imports(place.parent, [place.name])}
    return auto_map, files


def refuse_missing_code(path: Path, fitted: ConfigFit, present: Collection[str]) -> None:
    """Raise MismatchError if a config names code that is not there, and no library has its class: nobody can load it.

    Args:
        path: What is refused.
        fitted: The config that is written.
        present: Files of the directory.
    """
    missing = [name for name in named_code(fitted.config) if name not in present]
    if missing and fitted.measured_by is None:
        lines = [f"{name}: config.json names it in auto_map, and it is not there" for name in missing]
        summary = f"{len(missing)} Python files of the model are missing, without which nobody can load it"
        raise MismatchError(path, summary, lines, "Nothing was written. Put them beside the base model's config.json.")


def _with_imports(folder: Path, names: Iterable[str]) -> set[str]:
    """Those of the files that are there, and what they import."""
    found: set[str] = set()
    left = list(names)
    while left:
        name = left.pop()
        if name not in found and (folder / name).is_file():
            found.add(name)
            left += _imports(folder / name, name)
    return found


def _named_in(file: Path) -> list[str]:
    try:
        return named_code(read_json(file)) if file.is_file() else []
    except (CheckpointError, AttributeError):  # it names no code
        return []


def _imports(file: Path, name: str) -> Iterator[str]:
    """Relative paths of what a Python file imports from beside it."""
    text = ""
    with contextlib.suppress(ValueError, OSError):  # a copy of it will fail, and say why
        text = read_bounded(file, _MOST_BYTES).decode(errors="replace")
    for match in _IMPORTS.finditer(text):
        module = next(part for part in match.groups() if part)
        yield str(Path(name).parent / f"{module.replace('.', '/')}.py")
