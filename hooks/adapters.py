"""Models of peft: what becomes of them in a directory, the adapter alone or the model with the adapter merged."""

from __future__ import annotations

import contextlib
import copy
import logging
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from shardsmith.errors import UsageError
from shardsmith.export.adapters import ADAPTER_WEIGHTS, replaced_modules, without_adapter
from shardsmith.ground.layout import MAIN_WEIGHTS
from shardsmith.live.recognition import is_same_memory
from shardsmith.tensors.fqn import clean_fqn, unwrapped

from .ema import EMA
from .held import HeldView, held_model
from .view import MergedWeights, View

log = logging.getLogger(__name__)


class AdapterView(View):
    """The adapter alone, as ``PeftModel.save_pretrained`` writes it."""

    stem = ADAPTER_WEIGHTS

    def __init__(self, model: Any) -> None:
        """``model``: a PeftModel without wrappers around it."""
        self._model = model
        self._names: dict[str, str] = {}

    def names(self, fqns: Collection[str]) -> dict[str, str]:
        """FQN -> name in the files, of what is to be written."""
        if not self._names:  # asked once: peft may look on the Hub whether the vocabulary was resized
            from peft import get_peft_model_state_dict

            # peft filters a state dict by its keys. It is given names in place of values, which say what it has chosen.
            fqn_of = {fqn: fqn for fqn in fqns}
            for path, _ in self._model.named_modules():  # below which peft looks, FSDP1 wrappers included
                below = f"{clean_fqn(path, self._model)}."
                fqn_of |= {f"{path}.{fqn.removeprefix(below)}": fqn for fqn in fqns if fqn.startswith(below)}
            chosen = get_peft_model_state_dict(self._model, fqn_of, adapter_name=self._model.active_adapter)
            self._names = {fqn: clean_fqn(name) for name, fqn in chosen.items()}
        return self._names

    def write(self, directory: Path) -> None:
        """Write ``adapter_config.json``."""
        # A copy: the live config goes on saying that the adapter is trained.
        config = copy.copy(self._model.active_peft_config)
        config.inference_mode = True
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = getattr(self._model.get_base_model(), "name_or_path", None)
        config.save_pretrained(str(directory))


class MergedView(MergedWeights):
    """The whole model, with the adapter merged into its weights; the live weights are as before, bit for bit."""

    stem = MAIN_WEIGHTS

    def __init__(self, model: Any) -> None:
        """Raises UsageError where peft cannot merge, or we cannot under FSDP1."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        self._model = model
        self.inner: nn.Module | None = model.get_base_model()
        # What wrappers and peft put before the names of the base model is in no name of the files.
        self._prefix = next(clean_fqn(path, model) for path, part in model.named_modules() if part is self.inner) + "."
        modules = {clean_fqn(path, model): part for path, part in model.named_modules()}
        self._tuned = {path: part for path, part in modules.items() if isinstance(part, BaseTunerLayer)}
        self._replaced = replaced_modules(modules)
        self._values: dict[str, dict[str, Tensor]] = {}
        if (
            not all(hasattr(part, "merge") for part in self._tuned.values())
            or model.active_peft_config.is_prompt_learning
        ):
            raise UsageError("an adapter of this kind cannot be merged: export it as it is, with adapters='adapter'")
        if any(isinstance(part, FullyShardedDataParallel) for part in model.modules()):
            raise UsageError("under FSDP1 an adapter cannot be merged: use FSDP2, or adapters='adapter'")

    def names(self, fqns: Collection[str]) -> dict[str, str]:
        """As ``AdapterView.names``: those of the model without an adapter."""
        named = {fqn: self._name(fqn) for fqn in fqns}
        return {fqn: name.removeprefix(self._prefix) for fqn, name in named.items() if name is not None}

    @torch.no_grad()
    def merge(self) -> dict[str, Tensor]:
        """Merge one layer after the other, keep the result, and put back what was there."""
        merged: dict[str, Tensor] = {}
        for path, layer in self._tuned.items():
            weights = dict(layer.get_base_layer().named_parameters())
            # All parameters of the base layer: `merge` may change its bias, too.
            kept = {name: weight.detach().clone() for name, weight in weights.items()}
            own = {name: weight.data for name, weight in weights.items()}
            try:
                layer.merge()
                merged |= {f"{path}.base_layer.{name}": weight.detach().clone() for name, weight in weights.items()}
            finally:  # also without memory for the copy: the training goes on with this layer
                if layer.merged:
                    layer.unmerge()
                for name, weight in weights.items():
                    if not is_same_memory(weight.data, own[name]):  # a layer of single rows puts another in its place
                        weight.data = own[name]
                    weight.copy_(kept[name])  # adding and subtracting again is not exact
        return merged

    def _name(self, fqn: str) -> str | None:
        return without_adapter(fqn, self._tuned, self._replaced, self._model.active_adapter)


class HeldAdapter(View):
    """A model of peft that a module of somebody else's holds: its view, under the names that the module has."""

    def __init__(self, held: HeldView, view: AdapterView | MergedView) -> None:
        self._held, self._view = held, view
        self.stem, self.inner = view.stem, view.inner

    def names(self, fqns: Collection[str]) -> dict[str, str]:
        """As ``AdapterView.names``; of the module's other tensors none is written."""
        own = self._held.names(fqns)
        names = self._view.names(list(own.values()))
        return {fqn: names[name] for fqn, name in own.items() if name in names}

    def ties(self) -> dict[str, str]:
        """As ``HeldView.ties``."""
        return self._held.ties()

    def values(self, model: str) -> Mapping[str, Tensor]:
        """As ``MergedWeights.values``."""
        return {self._held.prefix + name: value for name, value in self._view.values(model).items()}

    def ready(self, ema: EMA | None) -> contextlib.AbstractContextManager[None]:
        """As ``MergedWeights.ready``."""
        return self._view.ready(ema)

    def write(self, directory: Path) -> None:
        """As ``AdapterView.write``."""
        self._view.write(directory)


def view_of(model: nn.Module, adapters: Literal["adapter", "merged"] | View, *, held: bool = True) -> View | None:
    """How to write a model of peft, or one that another module holds; None where it is written as it is.

    Args:
        model: As the trainer wrapped it.
        adapters: What of a model of peft, or a view of the caller's own.
        held: Whether to look for a model in the module: a name map of the caller's knows the module's own names.

    Raises:
        UsageError: an adapter cannot be merged.
    """
    if not isinstance(adapters, str):
        return adapters
    # Not imported for the question: without it no model is one of peft.
    peft = sys.modules.get("peft")
    bare = unwrapped(model)
    view = AdapterView if adapters == "adapter" else MergedView
    if peft is not None and isinstance(bare, peft.PeftModel):
        if others := [name for name in bare.peft_config if name != bare.active_adapter]:
            log.warning("only the active adapter, %s, is exported; in no export: %s", bare.active_adapter, others)
        return view(bare)
    found = held_model(model) if held else None
    if found is None and held and peft is not None:
        found = _held_beside_others(bare, peft.PeftModel)
    if found is not None and peft is not None and isinstance(found.inner, peft.PeftModel):
        return HeldAdapter(found, view(found.inner))
    return found


def _held_beside_others(module: nn.Module, kind: type[nn.Module]) -> HeldView | None:
    """The model of peft in a module that has tensors of its own as well, such as those of a critic's head.

    Raises UsageError if there are several.
    """
    parts = {clean_fqn(path, module): part for path, part in module.named_modules() if isinstance(part, kind)}
    # Of models of peft one inside the other, the outermost counts.
    outer = [path for path in parts if not any(path.startswith(f"{other}.") for other in parts)]
    if len(outer) > 1:
        raise UsageError(f"there are several models of peft, {', '.join(outer)}: pass the one to export as model=")
    if not outer:
        return None
    found = HeldView(outer[0], parts[outer[0]])
    names = dict.fromkeys(clean_fqn(name, module) for name, _ in module.named_parameters())
    others = [name for name in names if not name.startswith(found.prefix)]
    if others:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        log.warning("only %s is exported; in no export: %s%s", outer[0], ", ".join(others[:5]), more)
    return found
