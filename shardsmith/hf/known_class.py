"""The class that a config names, and what it makes of certain tensors, remembered."""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Mapping
from typing import Any

from shardsmith.ground.extras import install_line
from shardsmith.hf.config_entries import Config, undated
from shardsmith.hf.diffusers_class import DiffusersClass
from shardsmith.hf.model_class import DIFFUSERS_KEY, Fit, ModelClass
from shardsmith.hf.transformers_class import TransformersClass
from shardsmith.tensors.tensors import TensorSpec


def find_model_class(config: Mapping[str, Any]) -> tuple[ModelClass | None, str]:
    """The class that the content of a config.json names; None, and the reason, if there is none. Runs no remote code.

    Imports transformers or diffusers only where the config is one of theirs.
    """
    library = "diffusers" if DIFFUSERS_KEY in config else "transformers"
    if library == "transformers" and not (config.get("architectures") or config.get("model_type")):
        return None, "config.json names no class"
    # accelerate makes the models without data, by ``device_map``.
    needed = ("transformers", "accelerate") if library == "transformers" else ("diffusers",)
    if absent := [name for name in needed if importlib.util.find_spec(name) is None]:
        return None, f"{' and '.join(absent)} {'are' if absent[1:] else 'is'} not installed ({install_line(*absent)})"
    try:
        return (TransformersClass(config) if library == "transformers" else DiffusersClass(config)), ""
    except Exception as error:  # whatever a config that a library does not know makes it raise
        text = str(error).strip().splitlines() or [""]
        return None, f"{library} cannot make this model ({type(error).__name__}: {text[0][:200]})"


def model_class_of(config: Config) -> tuple[ModelClass | None, str]:
    """As ``find_model_class``, remembered."""
    return _find(json.dumps(undated(config), sort_keys=True, default=str))


def fit_of(model_class: ModelClass, config: Config, specs: Mapping[str, TensorSpec]) -> Fit:
    """As ``ModelClass.fit``, remembered: a directory that was planned is not judged twice."""
    key = (json.dumps(undated(config), sort_keys=True, default=str), tuple(sorted(specs.items())))
    if key not in _FITS:
        if len(_FITS) > 32:
            _FITS.clear()
        _FITS[key] = model_class.fit(specs)
    return _FITS[key]


_FITS: dict[Any, Fit] = {}


@functools.lru_cache(maxsize=32)
def _find(text: str) -> tuple[ModelClass | None, str]:
    return find_model_class(json.loads(text))
