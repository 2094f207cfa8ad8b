"""One model out of a checkpoint that holds several things: its tensors under its own names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from torch import Tensor

from shardsmith.errors import CheckpointNotFoundError, UnsupportedFormatError
from shardsmith.formats.dcp.beside_weights import open_step
from shardsmith.formats.dcp.source import DcpSource
from shardsmith.ground.layout import EMA_PREFIX
from shardsmith.manifest.metadata import read_metadata
from shardsmith.name_maps.maps import NameMap, Translation
from shardsmith.name_maps.rearranged import read_linked
from shardsmith.tensors.checkpoint_keys import (
    EMA,
    MAIN,
    KeyPath,
    average_above,
    find_averages,
    find_lost_averages,
    find_models,
    find_strays,
    find_twins,
)
from shardsmith.tensors.tensors import Chunk, TensorSource, TensorSpec
from shardsmith.tensors.wrappers import without_segments


class ModelSource:
    """Some tensors of a source under other names (a ``TensorSource``).

    Attributes:
        keys: The model's name of each tensor -> its name in the source.
        filled: Names that the model lacked and that were taken from the main weights.
        aliases: Names left out because they are tied to one that is there: alias -> kept name.
        averages: Where the checkpoint has several averages, this one and then the others, by name.
        twins: Other dicts of the checkpoint that hold tensors under the model's names, such as a teacher.
        left_out: What is called an average and does not have the model's names, name -> why; of an average, its tensors
            for which the model has no name.
    """

    def __init__(
        self,
        source: TensorSource,
        keys: Mapping[str, str],
        *,
        filled: frozenset[str],
        aliases: Mapping[str, str],
        averages: tuple[str, ...] = (),
        twins: tuple[str, ...] = (),
        left_out: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.twins = twins
        self.left_out = dict(left_out)
        self.keys = dict(keys)
        self.filled = filled
        self.aliases = dict(aliases)
        self.averages = averages
        self.path = source.path
        self._source = source
        self.specs: Mapping[str, TensorSpec] = {
            name: TensorSpec(name, source.specs[key].shape, source.specs[key].dtype) for name, key in keys.items()
        }

    @classmethod
    def whole(cls, source: TensorSource) -> Self:
        """Return all of a source that holds nothing but one model."""
        return cls(source, {name: name for name in source.specs}, filled=frozenset(), aliases={})

    def without(self, dropped: Iterable[str]) -> ModelSource:
        """Return the same but for some tensors."""
        gone = set(dropped)
        keys = {name: key for name, key in self.keys.items() if name not in gone}
        aliases = {alias: kept for alias, kept in self.aliases.items() if alias not in gone and kept not in gone}
        return self._of(keys, self.filled - gone, aliases)

    def only(self, keys: Mapping[str, str]) -> ModelSource:
        """Return some tensors alone: new name -> name here."""
        own = {new: self.keys[name] for new, name in keys.items()}
        return self._of(own, frozenset(new for new, name in keys.items() if name in self.filled), {})

    def tied(self, aliases: Mapping[str, str]) -> ModelSource:
        """Return the same with some names left out that are tied to others: alias -> kept name."""
        keys = {name: key for name, key in self.keys.items() if name not in aliases}
        return self._of(keys, self.filled - aliases.keys(), {**self.aliases, **aliases})

    def untied(self, aliases: Mapping[str, str]) -> ModelSource:
        """Return the same with some aliases as tensors of their own, of the same values."""
        keys = {**self.keys, **{alias: self.keys[kept] for alias, kept in aliases.items()}}
        filled = self.filled | {alias for alias, kept in aliases.items() if kept in self.filled}
        return self._of(keys, filled, {alias: kept for alias, kept in self.aliases.items() if alias not in aliases})

    def _of(self, keys: Mapping[str, str], filled: frozenset[str], aliases: Mapping[str, str]) -> ModelSource:
        return ModelSource(
            self._source,
            keys,
            filled=filled,
            aliases=aliases,
            averages=self.averages,
            twins=self.twins,
            left_out=self.left_out,
        )

    def pieces(self, name: str, box: Chunk) -> Iterator[tuple[Chunk, Tensor]]:
        """As ``TensorSource.pieces``."""
        if name not in self.keys:
            raise CheckpointNotFoundError(self.path, f"has no tensor named {name!r}")
        return self._source.pieces(self.keys[name], box)

    def close(self) -> None:
        """Close the files."""
        self._source.close()


class TranslatedModel:
    """A model under the names that its files are to have (a ``TensorSource``). Reads as little as the model does.

    Attributes:
        filled, aliases: Those of the model, as ``ModelSource`` has them, in the new names.
        left_out: Tensors of the model that the files have no place for, name -> why.
        averages: As ``ModelSource`` has them.
    """

    def __init__(self, model: ModelSource | TranslatedModel, name_map: NameMap) -> None:
        """Raises UsageError if the map loses, repeats or invents something."""
        self.path: Path = model.path
        self._model = model
        self._translation = Translation(name_map, model.specs)
        self.specs: Mapping[str, TensorSpec] = self._translation.translate(model.specs)
        self.averages: tuple[str, ...] = model.averages
        self.twins: tuple[str, ...] = model.twins
        self.left_out: dict[str, str] = {**model.left_out, **self._translation.left_out}
        self.filled: frozenset[str] = self._translation.names_of(model.filled)
        self.aliases: dict[str, str] = self._translation.translate_aliases(model.aliases, model.specs)

    def pieces(self, name: str, box: Chunk) -> Iterator[tuple[Chunk, Tensor]]:
        """As ``TensorSource.pieces``."""
        if name not in self.specs:
            raise CheckpointNotFoundError(self.path, f"has no tensor named {name!r}")
        yield from read_linked(self._model, self._translation.links_to(name), box, self.specs[name].dtype)

    def close(self) -> None:
        """Close the files."""
        self._model.close()


def beside_models(models: Mapping[str, ModelSource]) -> Iterator[str]:
    """Yield what a checkpoint holds beside the models that were taken from it, a line each: of a model all the same."""
    for source in models.values():
        yield from (f"{average}, one more average" for average in source.averages[1:])
        yield from (f"{twin}, which holds tensors under the model's names" for twin in source.twins)
        yield from (f"{name}: {reason}" for name, reason in source.left_out.items())


def open_dcp_model(directory: Path, model: str = MAIN, tied: Mapping[str, str] | None = None) -> ModelSource:
    """One model of a DCP directory, with our ``metadata.json`` or without.

    Args:
        directory: A DCP directory.
        model: ``"main"`` or ``"ema"``, where there are several averages also ``"ema:NAME"``. An average covers trained
            weights only; the rest comes from main.
        tied: Recorded ties: alias -> kept name. None reads them from ``metadata.json``.

    Raises:
        CheckpointNotFoundError: the checkpoint has no such model.
    """
    source = open_step(directory)
    return choose_model(source, source.index.containers, model, _tied(directory) if tied is None else tied)


def choose_model(
    source: TensorSource, paths: Mapping[str, KeyPath], model: str, tied: Mapping[str, str] = MappingProxyType({})
) -> ModelSource:
    """Take one model of an open source.

    Args:
        source: The open checkpoint.
        paths: Key -> path in the nested dict that was saved, as ``find_models`` takes it.
        model: As ``open_dcp_model`` takes it.
        tied: Recorded ties: alias -> kept name.

    Raises:
        CheckpointNotFoundError: the source has no such model.
    """
    model, _, average = model.partition(":")
    averages = find_averages(source.specs, paths)
    named = [*averages, *find_twins(source.specs, paths)] if average else []
    if average and average not in named:
        average = _like(average, named)
    # Without a name, or with the empty one that _like returns for our own average: the first average that there is.
    models = find_models(source.specs, paths, average or None)
    if average and EMA not in models:
        found = f"it holds {', '.join(named)}" if named else "none in it has a name"
        raise CheckpointNotFoundError(source.path, f"has no average {average!r}; {found}")
    if model not in models:
        found = ", ".join(models) or "no model at all"
        raise CheckpointNotFoundError(source.path, f"has no {model!r} weights; it holds {found}")
    ordered = sorted(averages, key=lambda name: name != average) if model == EMA else []
    twins = [name for name in find_twins(source.specs, paths) if name != average] if model == MAIN else []
    # Not of counts and decays alone, as in our own ``ema_state``.
    values = {average_above(paths.get(key, ())) for key, spec in source.specs.items() if spec.numel > 1}
    lost = [name for name in find_lost_averages(source.specs, paths) if name in values] if model == MAIN else []
    left_out = dict.fromkeys(lost, _WITHOUT_NAMES)
    if model == EMA:
        strays = find_strays(source.specs, paths, average or None)
        held = [key for key in strays if source.specs[key].numel > 1]  # not a count of updates
        left_out = dict.fromkeys(held, "in the average, not in the model")
    return _choose(source, models, model, tied, averages=tuple(ordered), twins=tuple(twins), left_out=left_out)


_WITHOUT_NAMES = (
    "it is called an average, and its tensors do not have the model's names; if it is a list, as of diffusers' "
    "EMAModel, its copy_to(model.parameters()) gives them names: save that model"
)


def _like(average: str, named: Sequence[str]) -> str:
    """The name of the average that is meant: ``ema`` for ``ema.module``, or ``state_dict.ema`` for ``ema``."""
    plain = without_segments(average)
    found = [name for name in named if f".{without_segments(name)}".endswith(f".{plain}")]
    if len(found) == 1:
        return found[0]
    return "" if f"{plain}." == EMA_PREFIX and not found else average  # ours has no name


def models_of(source: DcpSource, tied: Mapping[str, str] = MappingProxyType({})) -> dict[str, ModelSource]:
    """Take all models of an open DCP directory, by name; ``tied`` are its recorded ties, as for ``choose_model``."""
    models = find_models(source.specs, source.index.containers)
    return {model: choose_model(source, source.index.containers, model, tied) for model in models}


def _choose(
    source: TensorSource,
    models: Mapping[str, dict[str, str]],
    model: str,
    tied: Mapping[str, str],
    **beside: Any,
) -> ModelSource:
    main = models.get(MAIN, {})
    own = models[model]
    filled = frozenset(name for name in main if name not in own) if model == EMA else frozenset()
    names = list(dict.fromkeys([*main, *own])) if model == EMA else list(own)
    # A tie counts only if both names are there: otherwise the alias is the only copy.
    aliases = {alias: kept for alias, kept in tied.items() if alias in names and kept in names}
    # What the average lacks (frozen weights, buffers) is read from main, and named in ``filled``.
    keys = {name: own.get(name) or main[name] for name in names if name not in aliases}
    return ModelSource(source, keys, filled=filled - aliases.keys(), aliases=aliases, **beside)


def _tied(directory: Path) -> Mapping[str, str]:
    """The ties that a checkpoint of ours records; none for others."""
    try:
        return read_metadata(directory).tied
    except (CheckpointNotFoundError, UnsupportedFormatError):
        return {}
