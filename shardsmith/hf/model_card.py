"""The model card of an export: ``README.md`` with front matter as the Hugging Face Hub reads it, and how to load it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash

from shardsmith.ground.layout import PROVENANCE_FILE
from shardsmith.ground.local_copy import first_bytes
from shardsmith.ground.printable import printable
from shardsmith.ground.sizes import size_text
from shardsmith.hf.directory import DirectoryPlan, ModelPlan
from shardsmith.hf.loading_program import LoadingProgram
from shardsmith.tensors.digest import Digest
from shardsmith.tensors.dtypes import dtype_name

CARD_FILE = "README.md"
_MARK = "<!-- Written by shardsmith with the weights: an export over this directory writes its own. -->"
_CACHED = re.compile(r"models--([\w.-]+)--([\w.-]+)")
_HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?", re.ASCII)


def is_own_card(path: Path) -> bool:
    """Return whether a file is a model card that an export has written, and so says nothing of any other weights."""
    if path.name != CARD_FILE or not path.is_file():
        return False
    # At the beginning: the mark follows the front matter, and a card may be long.
    return _MARK.encode() in first_bytes(path, 4096)


def model_card(plan: DirectoryPlan, digests: Mapping[str, Mapping[str, Digest]], files: Collection[str]) -> bytes:
    """Return the card of a directory: where its weights come from, and how they are loaded.

    The same weights have the same card, whenever and wherever they are exported.

    Args:
        plan: The plan of the directory.
        digests: Digests of the written tensors, by model and tensor.
        files: What lies in the directory.
    """
    program = LoadingProgram(plan, files)
    base = _base_name(plan)
    front = [f"base_model: {base}"] if base else []
    front += [f"library_name: {program.library}"] if program.library else []
    step = "" if plan.origin.step is None else f" of step {plan.origin.step} of a training run"
    lines = [
        *("---", *front, "tags:", "- shardsmith", "---", _MARK, ""),
        f"# {base or 'Model'}{'' if plan.origin.step is None else f', step {plan.origin.step}'}",
        "",
        f"Weights{step}, exported by Shardsmith.",
        "",
        *("| | |", "|---|---|"),
        *([f"| base model | `{base}` |"] if base else []),
        *([f"| step | {plan.origin.step} |"] if plan.origin.step is not None else []),
        *(row for model in plan.models for row in _rows(model, plan, digests[model.model])),
        f"| check | {_plain(str(plan.measure))} |",
        *("", "## Load", "", "```python"),
        program.text,
        *("```", "", "## Verify", ""),
        f"`shardsmith verify DIRECTORY` compares every byte with `{PROVENANCE_FILE}`, which has a hash of each file",
        "and a digest of each tensor. The digests above are of the list of those: they tell two exports apart.",
    ]
    return ("\n".join(lines) + "\n").encode()


def digest_of_model(digests: Mapping[str, Digest]) -> str:
    """Return one digest for all tensors of a model: XXH3-128 of the lines ``NAME DIGEST``, sorted by name."""
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(digests.items()))
    return xxhash.xxh3_128_hexdigest(lines.encode("utf-8", "surrogatepass"))


def _rows(model: ModelPlan, plan: DirectoryPlan, digests: Mapping[str, Digest]) -> Iterator[str]:
    what = model.model if model.is_module else "weights" if model.model == "main" else _average(plan.origin.ema)
    dtypes = ", ".join(sorted({dtype_name(spec.dtype) for spec in model.specs}))
    files = ", ".join(f"`{_plain(file.name)}`" for file in model.weights.files[:1])
    more = f" and {len(model.weights.files) - 1} more" if len(model.weights.files) > 1 else ""
    yield f"| {what} | {files}{more}: {len(model.specs)} tensors, {size_text(model.nbytes)}, {dtypes} |"
    yield f"| digest of its tensors | `{digest_of_model(digests)}` |"


def _average(facts: Mapping[str, Any] | None) -> str:
    known = [f"{name} {facts[name]}" for name in ("decay", "updates") if facts and name in facts]
    return "average of the weights (EMA)" + (f", {', '.join(known)}" if known else "")


def _base_name(plan: DirectoryPlan) -> str | None:
    """The base model as the Hub calls it, as far as its path tells; the name of its folder otherwise."""
    if plan.base is None:
        return None
    # Through links: a cache of the Hub keeps the model's name in a folder above the snapshot.
    path = plan.base.resolve()
    cached = next((match for part in path.parts if (match := _CACHED.fullmatch(part))), None)
    name = "/".join(cached.groups()) if cached else path.name
    return name if _HUB_NAME.fullmatch(name) else None


def _plain(text: str) -> str:
    """Fit for a table and for code in Markdown."""
    return printable(text).replace("|", "/").replace("`", "'")
