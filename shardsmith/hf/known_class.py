"""The class that a config names, and what it makes of certain tensors, remembered."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

from shardsmith.hf.config_entries import Config, undated
from shardsmith.hf.model_class import Fit, ModelClass, find_model_class
from shardsmith.tensors.tensors import TensorSpec


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
