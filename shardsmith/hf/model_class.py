"""The class that a config.json names, and whether its own loader would fill it from certain tensors.

The measure is the library's, not ours: transformers loads tensors without data into a model without data, with all its
renamings, conversions and ties, and says what is missing, unexpected or of another shape. That takes a fraction of a
second for a model of any size.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import logging as levels
import tempfile
import threading
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from unittest.mock import patch

import torch
from torch import Tensor

from shardsmith.errors import UnsupportedFormatError
from shardsmith.ground.extras import install_line
from shardsmith.tensors.tensors import Shape, TensorSpec

if TYPE_CHECKING:
    from shardsmith.name_maps.slices import Target

DIFFUSERS_KEY = "_class_name"
"""In a config.json of diffusers: what ``architectures`` is in one of transformers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """What a class makes of certain tensors."""

    model_class: str
    """Such as ``LlamaForCausalLM of transformers 5.24.0``."""
    missing: tuple[str, ...] = ()
    """Tensors of the class that would keep random values, by its names."""
    unexpected: tuple[str, ...] = ()
    """Tensors that it has no place for."""
    ignored: tuple[str, ...] = ()
    """Tensors that it has no place for either, and that its loader passes over without a word."""
    shapes: Mapping[str, tuple[Shape, Shape]] = field(default_factory=dict)
    """Tensors of another shape, by the name in the class -> the given shape, and that of the class."""
    kinds: Mapping[str, tuple[torch.dtype, torch.dtype]] = field(default_factory=dict)
    """Whole numbers for what the class has as floating-point numbers, or the reverse: the given dtype, the class's."""
    error: str | None = None
    """What its loader raises."""

    @property
    def is_exact(self) -> bool:
        """Whether every tensor has its place, and every place its tensor."""
        return not self.count

    @property
    def count(self) -> int:
        """Number of differences."""
        found = len(self.missing) + len(self.unexpected) + len(self.shapes) + len(self.kinds)
        return found + (self.error is not None)

    @property
    def misplaced(self) -> int:
        """Number of tensors without a place, and of places without a tensor."""
        return len(self.missing) + len(self.unexpected) + len(self.ignored)

    @property
    def problems(self) -> list[str]:
        """A line for each difference."""
        lines = [f"{name}: in the model, not in the files" for name in self.missing]
        lines += [f"{name}: in the files, not in the model" for name in self.unexpected]
        lines += [f"{name}: {found} in the files, {wanted} in the model" for name, (found, wanted) in self._pairs()]
        return [*sorted(lines), *([self.error] if self.error else [])]

    @property
    def lines(self) -> list[tuple[str, str]]:
        """Name and line of each difference."""
        return [(line.split(": ", 1)[0], line) for line in self.problems]

    @property
    def class_name(self) -> str:
        """The class without library and version."""
        return self.model_class.split(" of ", 1)[0]

    def _pairs(self) -> Iterator[tuple[str, tuple[object, object]]]:
        yield from self.shapes.items()
        yield from self.kinds.items()


@dataclass(frozen=True, slots=True)
class Kept:
    """What a class has in float32 when it is loaded in a narrower dtype."""

    names: Set[str] = frozenset()
    """Of the tensors."""
    unknown: str = ""
    """Why it may be more than these; empty if these are all."""


class ModelClass(Protocol):
    """A class of models, as a config describes it."""

    name: str
    """With the library and its version."""

    @property
    def effective_config(self) -> Mapping[str, Any]:
        """The config with every default filled in."""
        ...

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """The state dict of the class, by its names in memory; tied tensors under each of their names."""
        ...

    @property
    def tied(self) -> Mapping[str, str]:
        """Alias -> kept name in memory, for tensors that the class ties; names in files count as aliases, too."""
        ...

    @property
    def unsaved(self) -> Set[str]:
        """Tensors of the state dict that its files do not hold, for the class computes them."""
        ...

    def fit(self, specs: Mapping[str, TensorSpec]) -> Fit:
        """Return what its loader makes of a directory that holds these tensors. Raises nothing."""
        ...

    def kept_from(self, dtype: torch.dtype, specs: Mapping[str, TensorSpec]) -> Kept:
        """Return those of a directory's tensors that its loader has in float32 if it is asked for a narrower dtype.

        Biases and routers of experts, for two. Its own save writes them in float32, so rounded they are not its own.
        """
        ...


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
        return (TransformersClass(config) if library == "transformers" else _of_diffusers(config)), ""
    except Exception as error:  # whatever a config that a library does not know makes it raise
        text = str(error).strip().splitlines() or [""]
        return None, f"{library} cannot make this model ({type(error).__name__}: {text[0][:200]})"


def _of_diffusers(config: Mapping[str, Any]) -> ModelClass:
    from shardsmith.hf.diffusers_class import DiffusersClass  # which imports this file

    return DiffusersClass(config)


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
        # On the meta device: the loader compares names and shapes, and no memory is asked for.
        state = {n: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for n, spec in specs.items()}
        try:
            with quiet_transformers(), _all_keys(kind) as (missing, unexpected):
                _, info = kind.from_pretrained(
                    None,
                    # A copy: a load changes its config.
                    config=copy.deepcopy(self._config),
                    state_dict=state,
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
        # Most classes keep nothing, and say so; what the others keep only their loader knows.
        plan = getattr(self._model, "_get_dtype_plan", None)
        if plan is not None and not plan(dtype):
            return Kept()
        state = {n: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for n, spec in self.specs.items()}
        try:
            with quiet_transformers():
                loaded = self._kinds[0].from_pretrained(
                    None, config=copy.deepcopy(self._config), state_dict=state, dtype=dtype, device_map={"": "meta"}
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


def _on_meta(kind: Any, config: Any) -> Any:
    with torch.device("meta"):
        return kind._from_config(copy.deepcopy(config), dtype=torch.get_default_dtype())


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


def specs_of(state: Mapping[str, Any]) -> dict[str, TensorSpec]:
    """Return the tensors of a state dict."""
    return {n: TensorSpec(n, tuple(t.shape), t.dtype) for n, t in state.items() if isinstance(t, Tensor)}


def other_kinds(
    given: Mapping[str, TensorSpec], wanted: Mapping[str, TensorSpec]
) -> dict[str, tuple[torch.dtype, torch.dtype]]:
    """Return, as ``Fit.kinds``, the tensors of which one side alone is of floating-point numbers."""
    return {
        name: (spec.dtype, wanted[name].dtype)
        for name, spec in given.items()
        if name in wanted and spec.dtype.is_floating_point != wanted[name].dtype.is_floating_point
    }


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


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Within it nothing is warned of, and random numbers are as they were afterwards.

    Both are of the whole process: a thread beside the training leaves them alone. Models without data draw none.
    """
    # ``warnings`` and the generator are of the whole process, so only the main thread may change them.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
