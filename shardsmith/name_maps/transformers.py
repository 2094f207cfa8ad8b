"""The names that ``save_pretrained`` of transformers 5 writes: its own weight conversions, run on tensors without data.

transformers says how it converts only by doing it. So it converts meta tensors, and where in which of them a result
lies is the map. What is computed is refused by name.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import nn

from shardsmith.errors import UnsupportedFormatError
from shardsmith.ground.extras import describe_failure
from shardsmith.ground.local_copy import on_this_machine
from shardsmith.name_maps.class_names import ComputedTensorsError
from shardsmith.name_maps.slices import Target
from shardsmith.name_maps.tracing import trace
from shardsmith.tensors.dtypes import dtype_name
from shardsmith.tensors.fqn import own_class
from shardsmith.tensors.tensors import TensorSpec

IDENTITY_ADVICE = "To write the names as they are in memory, ask for the identity; or write a name map"


class TransformersNames:
    """A ``NameMap``: what transformers' conversions for one model make of its tensors."""

    def __init__(
        self,
        origin: str | Path,
        model: Any,
        conversions: Sequence[Any],
        files: Mapping[str, TensorSpec] = MappingProxyType({}),
    ) -> None:
        """``model`` is on the meta device; ``conversions`` are those that ``from_pretrained`` applies when it loads.

        ``files`` are as ``of_directory`` takes them.
        """
        self._origin = origin
        self._model = model
        self._conversions = list(conversions)
        self._files = files

    @classmethod
    def of_directory(cls, base: Path, files: Mapping[str, TensorSpec] = MappingProxyType({})) -> Self:
        """For the model of a local directory. Runs no code of it.

        Args:
            base: The base model's directory, with config.json.
            files: The tensors in the base model's files, if it has any: some conversions only apply where a
                ``from_pretrained`` of the base would apply them, and some look at shapes.

        Raises:
            UnsupportedFormatError: there is no transformers 5, or it does not know this model.
        """
        return cls.of_files(base, meta_model_of(base), files)

    @classmethod
    def of_files(cls, origin: str | Path, model: Any, files: Mapping[str, TensorSpec]) -> Self:
        """For a model on the meta device and files with these tensors. Raises as ``of_directory``."""
        try:
            return cls(origin, model, _conversions_of(model, files), files)
        except Exception as error:  # whatever a pattern that does not fit makes it raise
            raise _unknown(origin, error) from error

    @classmethod
    def of_model(cls, live: nn.Module, files: Mapping[str, TensorSpec] = MappingProxyType({})) -> Self | None:
        """For a live model without wrappers around it; None if transformers converts nothing of it. Only reads it.

        Args:
            live: The model.
            files: Tensors of files whose shapes the conversions are to lead to, where they look at shapes.

        Raises:
            UnsupportedFormatError: the model cannot be made a second time from its config.
        """
        # Not imported: a model of transformers cannot be live without the module.
        modeling = sys.modules.get("transformers.modeling_utils")
        if modeling is None or not isinstance(live, modeling.PreTrainedModel) or not _is_converted(live):
            return None
        model = meta_twin_of(live)
        loaded_with: Any = getattr(live, "_weight_conversions", None)
        # What from_pretrained applied at the load is what save_pretrained reverts.
        conversions = _conversions_of(model, ()) if loaded_with is None else loaded_with
        return cls(own_class(live).__name__, model, conversions, files)

    def targets(self, specs: Mapping[str, TensorSpec]) -> dict[str, Target]:
        """As ``NameMap.targets``.

        Raises:
            UnsupportedFormatError: a conversion computes something.
        """
        try:
            found, refused = self._trace(self._conversions, specs)
            other = {n: spec for n, spec in self._files.items() if n in found and found[n].shape != spec.shape}
            if other and any(_looks_at_shapes(conversion) for conversion in self._conversions):
                # Traced a second time as if every check for a transposed shape said yes; a result counts only if it has
                # the file's shape.
                turned, _ = self._trace([_without_a_look(c) for c in self._conversions], specs)
                found |= {n: turned[n] for n, spec in other.items() if n in turned and turned[n].shape == spec.shape}
        except Exception as error:  # an operation that does not fit these tensors
            message = f"transformers cannot convert them ({type(error).__name__}: {error}). {IDENTITY_ADVICE}"
            raise UnsupportedFormatError(self._origin, message) from error
        if refused:
            self._refuse(refused, found, specs)
        return found

    def _trace(self, conversions: list[Any], specs: Mapping[str, TensorSpec]) -> tuple[dict[str, Target], list[str]]:
        from transformers.core_model_loading import revert_weight_conversion

        self._model._weight_conversions = conversions  # where transformers looks for them
        return trace(lambda tensors: revert_weight_conversion(self._model, tensors), specs)

    def _refuse(self, targets: Sequence[str], found: Mapping[str, Target], specs: Mapping[str, TensorSpec]) -> None:
        if mixed := self._of_several_dtypes(targets, specs):
            lines = "\n  ".join(
                f"{name}: {', '.join(f'{part} {dtype_name(specs[part].dtype)}' for part in parts)}"
                for name, parts in mixed.items()
            )
            message = (
                f"transformers saves {len(mixed)} tensors that it joins of several in memory, and the parts of each "
                f"have different dtypes, which one tensor cannot have:\n  {lines}\nCast the parts of each to one dtype "
                "where the checkpoint is written, or in the checkpoint"
            )
            raise ComputedTensorsError(self._origin, message)
        used = {source for target in found.values() for source in target.sources}
        sources = [name for name in specs if name not in used]
        lines = "\n  ".join(f"{name}: {self._operations(name)}" for name in sources)
        message = (
            f"transformers saves {len(targets)} tensors, {targets[0]} for one, that are not cut out of the tensors in "
            f"memory, so they cannot be written shard by shard. They are made of\n  {lines}\n{IDENTITY_ADVICE}"
        )
        raise ComputedTensorsError(self._origin, message)

    def _of_several_dtypes(self, refused: Sequence[str], specs: Mapping[str, TensorSpec]) -> dict[str, list[str]]:
        """What is refused -> its parts, if all of it would be joined of tensors of one dtype; else nothing."""
        alike = {name: TensorSpec(name, spec.shape, torch.float32) for name, spec in specs.items()}
        found, _ = self._trace(self._conversions, alike)
        parts = {name: list(dict.fromkeys(found[name].sources)) for name in refused if name in found}
        mixed = {name: held for name, held in parts.items() if len({specs[part].dtype for part in held}) > 1}
        return mixed if len(mixed) == len(refused) else {}

    def _operations(self, source: str) -> str:
        """What transformers does to a tensor when it saves."""
        for conversion in self._conversions[::-1]:
            reverse = conversion.reverse_transform()
            if hasattr(reverse, "operations") and reverse.rename_source_key(source)[1] is not None:
                return ", then ".join(map(repr, reverse.operations))
        return "no conversion that is known by its name"


def _looks_at_shapes(conversion: Any) -> bool:
    """Whether a conversion transposes what has another shape than in memory, and only that.

    When it saves, nothing has. But the files of the base model may be the transposed ones, as those of Qwen3-VL's
    experts are, and the class loads both.
    """
    return any(getattr(operation, "check_dims", False) for operation in getattr(conversion, "operations", ()))


def _without_a_look(conversion: Any) -> Any:
    """The same, transposing in any case."""
    changed = copy.deepcopy(conversion)
    for operation in getattr(changed, "operations", ()):
        if getattr(operation, "check_dims", False):
            operation.check_dims = False
    return changed


def names_for(model: Any) -> TransformersNames:
    """For a model on the meta device, as ``save_pretrained`` would name its tensors."""
    return TransformersNames(type(model).__name__, model, _conversions_of(model, ()))


def meta_model_of(base: Path) -> Any:
    """Return the model that a directory's config.json describes, on the meta device. Runs no code of it.

    Raises:
        UnsupportedFormatError: there is no transformers, or it does not know this model.
    """
    try:
        import transformers

        with on_this_machine(base) as place:
            config = transformers.AutoConfig.from_pretrained(str(place), trust_remote_code=False, local_files_only=True)
        return _on_meta(getattr(transformers, config.architectures[0]), config)
    except Exception as error:  # whatever a config that it does not know makes it raise
        raise _unknown(base, error) from error


def meta_twin_of(live: nn.Module) -> Any:
    """A model like a live one, on the meta device. Raises UnsupportedFormatError if its config cannot make it."""
    kind = own_class(live)
    try:
        return _on_meta(kind, live.config)
    except Exception as error:  # whatever a class of the user's raises
        reason = f"{type(error).__name__}: {error}"
        message = f"cannot be made from its config to see how transformers names it ({reason}). {IDENTITY_ADVICE}"
        raise UnsupportedFormatError(kind.__name__, message) from error


def _unknown(origin: str | Path, error: Exception) -> UnsupportedFormatError:
    reason = describe_failure(error)
    return UnsupportedFormatError(origin, f"transformers cannot make this model ({reason})")


def _on_meta(kind: Any, config: Any) -> Any:
    """A model without data. Leaves config and random numbers as they are."""
    # devices=[]: only the CPU's generator is saved and restored, and no accelerator is initialized for it.
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        return kind._from_config(copy.deepcopy(config))


def _is_converted(live: Any) -> bool:
    """Whether any conversion could apply to a live model when ``save_pretrained`` saves it."""
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    except ModuleNotFoundError:
        return False  # transformers 4 saves what is in memory
    from transformers.modeling_utils import PreTrainedModel

    if getattr(live, "_hf_peft_config_loaded", False) or getattr(live, "hf_quantizer", None) is not None:
        return False  # adapters and quantised weights are saved in other ways
    loaded_with = getattr(live, "_weight_conversions", None)
    if loaded_with is not None:
        return bool(loaded_with)
    submodels = [module for module in live.modules() if isinstance(module, PreTrainedModel)]
    keys = {kind.__name__ for module in submodels for kind in type(module).__mro__}
    keys |= {module.config.model_type for module in submodels}
    return any(get_checkpoint_conversion_mapping(key) for key in keys)


def _conversions_of(model: Any, names: Iterable[str]) -> list[Any]:
    """Those that ``from_pretrained`` would have used on files with these names; without names, as for a new model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        PrefixChange,
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    names = sorted(names, key=dot_natural_key)
    if not names:  # as revert_weight_conversion does: without files nobody knows whether they had a prefix
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        return [conversion for conversion in conversions if not isinstance(conversion, PrefixChange)]
    conversions = get_model_conversion_mapping(model)
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
    state = model.state_dict()
    for name in names:
        # For its side effect: each conversion notes that it was used.
        rename_source_key(name, renamings, converters, model.base_model_prefix, state)
    return [conversion for conversion in conversions if conversion.was_used()]
