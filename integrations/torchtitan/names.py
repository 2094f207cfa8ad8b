"""The names that TorchTitan's own models have in Hugging Face, through TorchTitan's own state-dict adapters.

An adapter says how it translates only by doing it. So it translates tensors without data, and where in which of them a
result lies is the map: permuted rows, experts one by one. ``--names torchtitan:llama3/debugmodel``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import Tensor

from shardsmith.errors import UnsupportedFormatError, UsageError
from shardsmith.hf.blueprint import Blueprint, without_weights
from shardsmith.load.buffer_reference import Fresh
from shardsmith.name_maps.maps import NameMap
from shardsmith.name_maps.slices import Target
from shardsmith.name_maps.tracing import trace
from shardsmith.tensors.tensors import Shape, TensorSpec

from .adapters import complete_translation, own_translation
from .inner import BACKEND, InnerNames
from .models import TitanModel, build_titan_model

_RIGHT_MODEL = "Is it the right model, and the right version of TorchTitan?"


def torchtitan_names(config: dict[str, Any] | None, title: str = "") -> NameMap:
    """Return the entry point: ``--names torchtitan:MODEL/FLAVOR``.

    Raises:
        UsageError: there is no such flavor, or its heads are not those of the config.
    """
    if not title:
        raise UsageError("which of TorchTitan's models is it? --titan-model llama3 --titan-flavor debugmodel")
    if title.partition("/")[0] == BACKEND:
        return InnerNames("model", None)  # a model of transformers, whatever its flavor
    titan = build_titan_model(title)
    _compare_heads(titan, config or {})
    return FlavorNames(titan, config)


class TorchTitanNames:
    """A ``NameMap``: what a state-dict adapter of TorchTitan makes of a model's tensors.

    What an adapter drops is an error if the model learns it; a buffer is left out, and said to be.
    """

    def __init__(
        self,
        adapter: Any,
        buffers: Collection[str],
        config: Mapping[str, Any] | None = None,
        shapes: Mapping[str, Shape] | None = None,
    ) -> None:
        """Changes nothing of the adapter.

        Args:
            adapter: TorchTitan's state-dict adapter.
            buffers: Clean names of the model's buffers.
            config: config.json of the files, whose class decides on some names.
            shapes: Of all the tensors that there can be; an adapter of another model may fit by chance.
        """
        self._kind = type(adapter).__name__
        self._to_hf = complete_translation(adapter, config)
        self._buffers = frozenset(buffers)
        self._shapes = shapes
        self._answer: tuple[tuple[TensorSpec, ...], dict[str, Target]] | None = None  # many experts take a second

    def targets(self, specs: Mapping[str, TensorSpec]) -> dict[str, Target]:
        """As ``NameMap.targets``.

        Raises:
            UnsupportedFormatError: the adapter does not know a tensor, drops a weight, or computes something.
        """
        asked = tuple(specs.values())
        if self._answer is None or self._answer[0] != asked:
            self._answer = asked, self._ask(specs)
        return self._answer[1]

    def leaves_out(self, specs: Mapping[str, TensorSpec]) -> dict[str, str]:
        """Return the buffers that the adapter has no name for."""
        used = {source for target in self.targets(specs).values() for source in target.sources}
        reason = f"{self._kind} has no name for it in Hugging Face"
        return {name: reason for name in specs if name not in used}

    def _ask(self, specs: Mapping[str, TensorSpec]) -> dict[str, Target]:
        kind = self._kind
        if problems := self._find_strange(specs):
            lora = [name for name in specs if "lora_" in name]
            advice = _why_dropped(lora) if lora else _RIGHT_MODEL
            message = f"{len(problems)} tensors are not those of this model. {advice}"
            raise UnsupportedFormatError(kind, "\n  ".join([message, *problems]))
        try:
            # On meta tensors: what each result is cut out of is its name map.
            found, refused = trace(self._to_hf, specs)
        except Exception as error:  # a name that it does not know is a KeyError, a shape whatever it may be
            reason = f"{type(error).__name__}: {error}"
            raise UnsupportedFormatError(kind, f"cannot translate these tensors ({reason}). {_RIGHT_MODEL}") from error
        if refused:
            message = f"computes {len(refused)} tensors instead of cutting them out of others"
            raise UnsupportedFormatError(kind, "\n  ".join([message, *refused]))
        used = {source for target in found.values() for source in target.sources}
        if dropped := [name for name in specs if name not in used and name not in self._buffers]:
            raise UnsupportedFormatError(kind, "\n  ".join([_why_dropped(dropped), *dropped]))
        return found

    def _find_strange(self, specs: Mapping[str, TensorSpec]) -> list[str]:
        if self._shapes is None:
            return []
        problems = {name: "there is none in the model" for name in specs if name not in self._shapes}
        problems |= {
            name: f"{spec.shape}, {self._shapes[name]} in the model"
            for name, spec in specs.items()
            if spec.shape != self._shapes.get(name, spec.shape)
        }
        return [f"{name}: {problem}" for name, problem in problems.items()]


def _why_dropped(names: list[str]) -> str:
    """What it means that an adapter has no name for weights, and what to do."""
    if all("lora_" in name for name in names):
        return (
            f"has no name for {len(names)} weights of LoRA: TorchTitan's adapter knows the full model only. Export "
            "from the run itself, which merges them or writes them as peft does (export_last, export_lora)"
        )
    try:
        installed = f"TorchTitan {version('torchtitan')}"
    except PackageNotFoundError:
        installed = "this TorchTitan"
    return (
        f"the state-dict adapter of {installed} has no name for {len(names)} weights of this model, which is a fault "
        "of the adapter unless the model was changed in the job. Nothing can be exported, or loaded from Hugging Face "
        "files, through it: take a TorchTitan that has the names, or a name map of your own (docs/extending.md)"
    )


class RunNames(TorchTitanNames):
    """Those of the model that a run trains, in the files that TorchTitan reads: by its adapter alone."""

    def __init__(self, adapter: Any, buffers: Collection[str], fresh: Fresh | None) -> None:
        """``fresh`` makes such a model anew; None where nobody knows how."""
        super().__init__(adapter, buffers)
        # Without the rules of ours: TorchTitan reads files by its adapter alone.
        self._to_hf = own_translation(adapter)
        self._fresh = fresh

    def make(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Buffers that no files have, as they are in a new model."""
        wanted = set(names)
        if not wanted or not callable(self._fresh):
            return {}
        with without_weights():
            model = self._fresh()
        return {name: buffer for name, buffer in model.named_buffers() if name in wanted}


class FlavorNames(TorchTitanNames):
    """Those of a model by name and flavor, which is known: other tensors than its own are refused.

    Attributes:
        blueprint: What its state dict holds.
    """

    def __init__(self, titan: TitanModel, config: Mapping[str, Any] | None = None) -> None:
        """``config``: config.json of the files."""
        self.blueprint: Blueprint = titan.blueprint()
        self._titan = titan
        shapes = {name: spec.shape for name, spec in self.blueprint.state_dict.items()}
        super().__init__(titan.adapter, self.blueprint.buffers, config, shapes)

    def make(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Buffers that no files have, as they are in a new model."""
        wanted = set(names)
        if not wanted:
            return {}
        return {name: value for name, value in self._titan.make_buffers().items() if name in wanted}


def _compare_heads(titan: TitanModel, config: Mapping[str, Any]) -> None:
    """Raise UsageError if a flavor has not the heads that a config says: shapes do not tell, and values go astray."""
    ours = titan.heads()
    theirs = config.get("num_attention_heads"), config.get("num_key_value_heads", config.get("num_attention_heads"))
    # The same weights fit any number of heads, so the shapes cannot tell.
    if None not in (*ours, *theirs) and ours != theirs:
        found = f"{ours[0]} heads and {ours[1]} of keys and values, config.json says {theirs[0]} and {theirs[1]}"
        raise UsageError(f"{titan.title} is not the base model: it has {found}")
