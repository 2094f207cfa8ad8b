"""Models that TorchTitan trains with LoRA: merged into their weights, or the adapter alone in the layout of peft.

TorchTitan keeps ``lora_a`` and ``lora_b`` inside the layer that they change. Its state-dict adapters know nothing of
them; what an adapter does to the rows of a weight is done to the rows of ``lora_b``, too.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shardsmith.errors import UnsupportedFormatError
from shardsmith.export.adapters import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS
from shardsmith.ground.layout import MAIN_WEIGHTS
from shardsmith.ground.ranks import Ranks
from shardsmith.hooks.view import MergedWeights, View
from shardsmith.load.live_weights import model_state_dict
from shardsmith.name_maps.grids import Axis
from shardsmith.name_maps.recorded import read_slices, slices_to_plain
from shardsmith.name_maps.slices import Slice, Target
from shardsmith.name_maps.tracing import trace
from shardsmith.tensors.fqn import clean_fqn
from shardsmith.tensors.tensors import TensorSpec

from .adapters import Translate

_A, _B = ".lora_a.weight", ".lora_b.weight"
_FUSED = "wqkv"


def find_lora(model: nn.Module) -> dict[str, Any]:
    """Path -> layer of TorchTitan's that has an adapter; empty for a model without."""
    found = {clean_fqn(path, model): module for path, module in model.named_modules()}
    return {path: module for path, module in found.items() if hasattr(module, "_lora_scaling")}


class MergedLora(MergedWeights):
    """The model with the adapter merged into its weights; the live weights are as before, bit for bit."""

    stem = MAIN_WEIGHTS

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._layers = find_lora(model)
        self._values: dict[str, dict[str, Tensor]] = {}

    def names(self, fqns: Collection[str]) -> dict[str, str]:
        """FQN -> name, of what is written: all but the adapter's own."""
        return {fqn: fqn for fqn in fqns if not fqn.endswith((_A, _B))}

    @torch.no_grad()
    def merge(self) -> dict[str, Tensor]:
        """As ``MergedWeights.merge``."""
        own = {clean_fqn(name, self._model) for name, _ in self._model.named_parameters()}
        kept = {path: layer.weight.detach().clone() for path, layer in self._layers.items()}
        try:
            for layer in self._layers.values():
                # What the layer computes with: W + scaling * B A.
                layer.weight.add_(layer._lora_scaling * (layer.lora_b.weight @ layer.lora_a.weight))
            state = model_state_dict(self._model)
            changed = {f"{path}.weight" for path in self._layers}
            # what is no parameter was made by hooks, such as the parts of a fused projection
            return {n: state[n].detach().clone() for n in self.names(state) if n in changed or n not in own}
        finally:
            for path, layer in self._layers.items():
                layer.weight.copy_(kept[path])  # adding and subtracting again is not exact


class LoraAlone(View):
    """The adapter alone, as peft's ``save_pretrained`` writes it. Both how it is written and its ``NameMap``."""

    stem = ADAPTER_WEIGHTS

    def __init__(self, model: nn.Module, to_hf: Translate, kind: str, base: Path, ranks: Ranks) -> None:
        """Find out what the adapter's tensors are called. All ranks; communicates: each may have stages of a pipeline.

        Args:
            model: The live model.
            to_hf: From TorchTitan's weights to those of transformers.
            kind: Name of the class that says it.
            base: The model that the adapter is for.
            ranks: All ranks.

        Raises:
            RankFailedError: on all ranks, if ``to_hf`` does more to a weight than to move its rows, or has no name
                for it.
        """
        self._layers = find_lora(model)
        self._fused = {path: model.get_submodule(path.rpartition(".")[0]) for path in self._layers if _FUSED in path}
        self._base = base
        self._asked: dict[str, int] = {}  # by tensor: how many of its copies have a target
        self._copies: dict[str, str] = {}
        united = ranks.agree("naming the adapters of all stages", lambda: self._own(to_hf, kind), _unite, large=True)
        self._targets = read_slices(united["targets"])
        self._modules: list[str] = united["modules"]
        self._sizes: dict[str, float] = united["sizes"]

    def names(self, fqns: Collection[str]) -> dict[str, str]:
        """FQN -> name, of what is written: the adapter's own."""
        return {fqn: fqn for fqn in fqns if fqn.endswith((_A, _B))}

    def copies(self) -> Mapping[str, str]:
        """Return further copies of ``lora_a`` of a fused projection, which each part of it has in the files."""
        return self._copies

    def targets(self, specs: Mapping[str, TensorSpec]) -> dict[str, Target]:
        """As ``NameMap.targets``."""
        return {name: target for name, target in self._targets.items() if set(target.sources) <= specs.keys()}

    def write(self, directory: Path) -> None:
        """Write ``adapter_config.json``."""
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str(self._base),
            **self._sizes,
            "target_modules": self._modules,
            "bias": "none",
            "lora_dropout": 0.0,
            "inference_mode": True,
        }
        (directory / ADAPTER_CONFIG_FILE).write_text(json.dumps(config, indent=2))

    def _own(self, to_hf: Translate, kind: str) -> dict[str, Any]:
        """What this rank has of the adapter. As JSON."""
        targets, modules = self._find(to_hf, kind) if self._layers else ({}, [])
        sizes = {}
        for layer in self._layers.values():
            rank = layer.lora_a.weight.shape[0]
            # peft computes the scaling again, as lora_alpha / r.
            sizes = {"r": rank, "lora_alpha": layer._lora_scaling * rank}
        return {"targets": slices_to_plain(targets, {}), "modules": modules, "sizes": sizes}

    def _find(self, to_hf: Translate, kind: str) -> tuple[dict[str, Target], list[str]]:
        # It is asked only where rows go, so any dtype does.
        weights = {
            (name := f"{path}.weight"): TensorSpec(name, tuple(layer.weight.shape), torch.float32)
            for path, layer in self._layers.items()
        }
        found, _ = trace(lambda tensors: to_hf(self._split(tensors)), weights)
        targets: dict[str, Target] = {}
        modules = []
        for name, target in found.items():
            path = target.sources[0].removesuffix(".weight")
            layer = self._layers[path]
            module = name.removesuffix(".weight")
            a = TensorSpec(self._one_more(path + _A), tuple(layer.lora_a.weight.shape), torch.float32)
            targets[f"base_model.model.{module}.lora_A.weight"] = Slice.whole(a)
            # lora_b has the rows of the weight, and r columns.
            rows = _rows_of(target, path + _B, layer.lora_b.weight.shape[1])
            if rows is None:
                problem = f"does more to {path}.weight than to move its rows: export_lora=merged exports it"
                raise UnsupportedFormatError(kind, problem)
            targets[f"base_model.model.{module}.lora_B.weight"] = rows
            modules.append(module)
        named = {source for target in found.values() for source in target.sources}
        if nameless := sorted(weights.keys() - named):
            raise UnsupportedFormatError(kind, "\n  ".join(["has no name for weights with an adapter", *nameless]))
        return targets, modules

    def _one_more(self, name: str) -> str:
        """A name that no target has yet: that of the tensor, then those of copies."""
        self._asked[name] = count = self._asked.get(name, -1) + 1
        if not count:
            return name
        self._copies[f"{name}.{count}"] = name
        return f"{name}.{count}"

    def _split(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Fused projections in parts, as a state dict has them."""
        state = dict(tensors)
        for path, module in self._fused.items():
            prefix = path.rpartition(".")[0] + "."
            for hook in module._state_dict_hooks.values():
                # As torch calls the hooks of a state dict: module, state, prefix, metadata.
                hook(module, state, prefix, {})
        return state


def _unite(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """On rank 0. As JSON, in the order of the stages."""
    return {
        "targets": {name: target for part in parts for name, target in part["targets"].items()},
        "modules": list(dict.fromkeys(module for part in parts for module in part["modules"])),
        "sizes": {name: size for part in parts for name, size in part["sizes"].items()},
    }


def _rows_of(target: Target, source: str, columns: int) -> Slice | None:
    """The rows of a weight as those of another tensor, whole; None if it is not made of whole rows."""
    if not isinstance(target, Slice) or len(target.dims) != 2 or any(axis.dim != 0 for axis in target.dims[0]):
        return None
    # The columns must all be there, in their order.
    if [axis.dim for axis in target.dims[1]] != [1] or target.start[1]:
        return None
    return replace(target, source=source, dims=(target.dims[0], (Axis(1, 1, columns),)))
