"""A class of diffusers, which loads by name alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from typing import Any

import torch

from shardsmith.hf.model_class import DIFFUSERS_KEY, Fit, Kept, other_kinds, specs_of, undisturbed
from shardsmith.tensors.tensors import TensorSpec


class DiffusersClass:
    """A class of diffusers (a ``ModelClass``)."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Raises whatever diffusers does if it cannot make the model."""
        import diffusers

        from shardsmith.tensors.fqn import tied_weights

        kind: Any = getattr(diffusers, str(config[DIFFUSERS_KEY]))
        # diffusers has no initialisation apart from making the model, so the default device does it.
        with torch.device("meta"), undisturbed():
            model = kind.from_config({k: v for k, v in config.items() if k != "quantization_config"})
        self.name = f"{kind.__name__} of diffusers {diffusers.__version__}"
        self.effective_config: Mapping[str, Any] = json.loads(model.to_json_string())
        self.specs: Mapping[str, TensorSpec] = specs_of(model.state_dict())
        self.tied: Mapping[str, str] = tied_weights(model)
        self.unsaved: Set[str] = frozenset()
        self._kept = frozenset(getattr(kind, "_keep_in_fp32_modules", None) or ())

    def fit(self, specs: Mapping[str, TensorSpec]) -> Fit:
        """As ``ModelClass``: diffusers loads by name alone."""
        # Of a tie one name is enough, and which one the files have is not said.
        tied = {*self.tied, *self.tied.values()}
        return Fit(
            model_class=self.name,
            missing=tuple(name for name in self.specs if name not in specs and name not in tied),
            unexpected=tuple(name for name in specs if name not in self.specs),
            shapes={
                name: (spec.shape, self.specs[name].shape)
                for name, spec in specs.items()
                if name in self.specs and spec.shape != self.specs[name].shape
            },
            kinds=other_kinds(specs, self.specs),
        )

    def kept_from(self, dtype: torch.dtype, specs: Mapping[str, TensorSpec]) -> Kept:  # noqa: ARG002
        """As ``ModelClass``: diffusers goes by the parts of a name, at any dtype."""
        return Kept({name for name in specs if not self._kept.isdisjoint(name.split("."))})
