"""A class of transformers: its loader is given tensors without data, for a model without data.

It does all its renamings, conversions and ties, and says what is missing, unexpected or of another shape. That takes a
fraction of a second for a model of any size.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging as levels
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch

from shardsmith.errors import UnsupportedFormatError
from shardsmith.hf.model_class import Fit, Kept, other_kinds, specs_of, undisturbed
from shardsmith.tensors.tensors import TensorSpec

if TYPE_CHECKING:
    from shardsmith.name_maps.slices import Target


class TransformersClass:
    """A class of transformers (a ``ModelClass``)."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Raises whatever transformers does if it cannot make the model."""
        import transformers

        self._version = transformers.__version__
        # A quantised model has other modules; names and shapes are compared with those of the plain one.
        plain = {key: value for key, value in config.items() if key != "quantization_config"}
        self._config = _as_transformers_reads(plain)
        self._kinds = _classes_for(plain, self._config)
        # ``architectures`` with one class, or all that could be meant; the first one gives names and config.
        with quiet_transformers():
            self._model = _on_meta(self._kinds[0], self._config)
        self.name = self._full_name(self._kinds[0])
        self._kept: dict[torch.dtype, Kept] = {}

    @cached_property
    def effective_config(self) -> Mapping[str, Any]:
        """As ``ModelClass``."""
        content: dict[str, Any] = json.loads(self._config.to_json_string(use_diff=False), parse_constant=str)
        return content

    @cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        """As ``ModelClass``."""
        return specs_of(self._model.state_dict())

    @cached_property
    def tied(self) -> Mapping[str, str]:
        """As ``ModelClass``: what the class ties by name, and what is one parameter in it."""
        from shardsmith.tensors.fqn import tied_weights  # which imports what only a model needs

        # What is declared may be tied by a load only; what is one parameter need not be declared.
        declared = dict(getattr(self._model, "all_tied_weights_keys", None) or {})
        return _with_file_names({**declared, **tied_weights(self._model)}, self._file_names, self.specs)

    @property
    def unsaved(self) -> Set[str]:
        """As ``ModelClass``."""
        return set(getattr(self._model, "_keys_to_ignore_on_save", None) or ())

    def fit(self, specs: Mapping[str, TensorSpec]) -> Fit:
        """As ``ModelClass``. Where the config names no architecture: of the class that fits best."""
        found: list[Fit] = []
        for kind in self._kinds:
            found.append(self._fit(kind, specs))
            # Exact and nothing passed over: no other class can fit better.
            if found[-1].is_exact and not found[-1].ignored:
                return found[-1]
        # Errors last; then by tensors without a place, before those of another shape.
        return min(found, key=lambda fit: (fit.error is not None, fit.misplaced, fit.count))

    def _fit(self, kind: Any, specs: Mapping[str, TensorSpec]) -> Fit:
        fit = Fit(model_class=self._full_name(kind))
        try:
            with quiet_transformers(), _all_keys(kind) as (missing, unexpected):
                _, info = kind.from_pretrained(
                    None,
                    # A copy: a load changes its config.
                    config=copy.deepcopy(self._config),
                    state_dict=_without_data(specs),
                    dtype=torch.get_default_dtype(),  # so that the default stays as it is, for all threads
                    device_map={"": "meta"},
                    # Shapes are reported like the rest instead of raising at the first.
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                )
        except Exception as error:  # a conversion that does not go with these tensors, for one
            return replace(fit, error=f"from_pretrained raises {type(error).__name__}: {error}")
        return replace(
            fit,
            # Before the class has taken out what it does not warn of; what it never saves is meant to be missing.
            missing=tuple(sorted((missing - self.unsaved) | info["missing_keys"])),
            unexpected=tuple(sorted(info["unexpected_keys"])),
            ignored=tuple(sorted(unexpected - info["unexpected_keys"])),
            shapes={name: (tuple(given), tuple(wanted)) for name, given, wanted in info["mismatched_keys"]},
            # Names in memory are compared with those in files here: of the first class only, whose specs are known.
            kinds=other_kinds(specs, self.specs) if kind is self._kinds[0] else {},
        )

    def kept_from(self, dtype: torch.dtype, specs: Mapping[str, TensorSpec]) -> Kept:
        """As ``ModelClass``."""
        kept = self._in_float32(dtype)
        if kept.unknown or kept.names <= specs.keys():
            return kept
        # Of a tie, and of what the class computes, files need not have a tensor of that name.
        wanted = {name for name in kept.names if name not in self.tied and name not in self.unsaved}
        try:
            made = self._made_of(kept.names, specs)
        except Exception as error:  # whatever a conversion that does not go with these tensors makes it raise
            made, reason = {}, f"the names in the files cannot be found out ({type(error).__name__}: {error})"
        else:
            reason = "the files have them under names that are not known"
        held = {name: target.sources for name, target in made.items() if name in specs}
        moved = {source for target in made.values() for source in target.sources}
        found = {*held, *((kept.names & specs.keys()) - moved)}
        lost = sorted(wanted - found - {source for sources in held.values() for source in sources})
        more = f" and {len(lost) - 1} more" if lost[1:] else ""
        return Kept(found, f"{lost[0]}{more}: {reason}" if lost else "")

    def _made_of(self, names: Collection[str], specs: Mapping[str, TensorSpec]) -> Mapping[str, Target]:
        """What files with these tensors have of some tensors in memory."""
        from shardsmith.name_maps.transformers import TransformersNames

        with quiet_transformers():
            name_map = TransformersNames.of_files(self.name, self._model, specs)
            # A few alone, which takes a fraction of the time; parts of a joined tensor need the others.
            with contextlib.suppress(UnsupportedFormatError):
                return name_map.targets({name: self.specs[name] for name in names})
            made = name_map.targets(self.specs)
        return {name: target for name, target in made.items() if not {*names}.isdisjoint(target.sources)}

    def _in_float32(self, dtype: torch.dtype) -> Kept:
        """In memory, what the loader makes float32 although it is asked for a narrower dtype."""
        if dtype not in (torch.float16, torch.bfloat16):
            return Kept()
        if dtype not in self._kept:
            self._kept[dtype] = self._load_in(dtype)
        return self._kept[dtype]

    def _load_in(self, dtype: torch.dtype) -> Kept:
        plan = getattr(self._model, "_get_dtype_plan", None)
        try:
            with quiet_transformers():
                if plan is not None and not plan(dtype):
                    # Most classes keep nothing by name. Some make tensors in float32 whatever they are asked for.
                    loaded = _on_meta(self._kinds[0], self._config, dtype)
                else:  # what these keep only their loader knows
                    loaded = self._kinds[0].from_pretrained(
                        None,
                        config=copy.deepcopy(self._config),
                        state_dict={
                            n: torch.empty(s.shape, dtype=s.dtype, device="meta") for n, s in self.specs.items()
                        },
                        dtype=dtype,
                        device_map={"": "meta"},
                    )
        except Exception as error:  # whatever a class that is loaded in another way makes it raise
            return Kept(unknown=f"its loader raises {type(error).__name__}: {error}")
        return Kept({name for name, tensor in loaded.state_dict().items() if tensor.dtype == torch.float32})

    @cached_property
    def _file_names(self) -> Mapping[str, str]:
        """Name in memory -> name in files, where a tensor is the same in both. Empty where transformers cannot say."""
        from shardsmith.name_maps.slices import Slice
        from shardsmith.name_maps.transformers import names_for

        with contextlib.suppress(Exception), quiet_transformers():
            targets = names_for(self._model).targets(self.specs)
            return {target.sources[0]: name for name, target in targets.items() if isinstance(target, Slice)}
        return {}

    def _full_name(self, kind: Any) -> str:
        return f"{kind.__name__} of transformers {self._version}"


def _as_transformers_reads(config: Mapping[str, Any]) -> Any:
    """The config object that ``from_pretrained`` makes of this config.json. Runs no code of a repository."""
    import transformers

    # As a file: the same way in which ``from_pretrained`` reads it.
    with tempfile.TemporaryDirectory(prefix="shardsmith-config-") as place, quiet_transformers():
        Path(place, "config.json").write_text(json.dumps(config))
        return transformers.AutoConfig.from_pretrained(place, trust_remote_code=False, local_files_only=True)


def _classes_for(plain: Mapping[str, Any], config: Any) -> Sequence[Any]:
    """The class that ``architectures`` names; without one, all that the auto classes have for the config."""
    import transformers
    from transformers.models.auto import modeling_auto

    if plain.get("architectures"):
        return [getattr(transformers, plain["architectures"][0])]
    mappings = [m for name, m in vars(modeling_auto).items() if name.startswith("MODEL_") and name.endswith("_MAPPING")]
    found: dict[Any, None] = {}
    for mapping in mappings:
        # The mappings are lazy: a class that this version lacks raises when it is asked for.
        with contextlib.suppress(KeyError, ValueError):
            kinds = mapping[type(config)]
            found |= dict.fromkeys(kinds if isinstance(kinds, tuple | list) else [kinds])
    if not found:
        raise LookupError(f"no auto class has a model for {type(config).__name__}")
    return list(found)


def _without_data(specs: Mapping[str, TensorSpec]) -> dict[str, torch.Tensor]:
    """What a loader can compare by names and shapes, and no memory is asked for."""
    return {name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for name, spec in specs.items()}


def _on_meta(kind: Any, config: Any, dtype: torch.dtype | None = None) -> Any:
    """A model without data; in the default dtype, so that this stays as it is for all threads, unless one is given."""
    with torch.device("meta"):
        return kind._from_config(copy.deepcopy(config), dtype=dtype or torch.get_default_dtype())


@contextlib.contextmanager
def _all_keys(kind: Any) -> Iterator[tuple[set[str], set[str]]]:
    """What a load within it misses and what it has no use for, before the class takes out what it does not warn of."""
    missing: set[str] = set()
    unexpected: set[str] = set()
    adjust = getattr(kind, "_adjust_missing_and_unexpected_keys", None)

    if adjust is None:  # transformers 4
        yield missing, unexpected
        return

    # transformers 5.0 gives two sets, later versions one object that holds them.
    def note(model: Any, *found: Any) -> Any:
        names = (found[0].missing_keys, found[0].unexpected_keys) if len(found) == 1 else found  # sets in 5.0
        missing.update(names[0])
        unexpected.update(names[1])
        return adjust(model, *found)

    with patch.object(kind, "_adjust_missing_and_unexpected_keys", note):
        yield missing, unexpected


def _with_file_names(
    tied: Mapping[str, str], file_names: Mapping[str, str], in_memory: Collection[str]
) -> dict[str, str]:
    """The ties with the names in files besides, unless one is that of another tensor in memory."""
    found = dict(tied)
    for name in {*tied, *tied.values()}:
        in_files = file_names.get(name, name)
        # A name in files may be that of another tensor in memory, as where a prefix was moved.
        if in_files not in in_memory:
            found[in_files] = tied.get(name, name)
    return found


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Within it transformers prints nothing, and random numbers are left alone."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(levels.CRITICAL)
    logging.disable_progress_bar()
    try:
        with undisturbed():
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
