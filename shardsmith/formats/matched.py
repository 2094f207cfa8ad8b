"""A checkpoint's tensors under the names of a model's files, or of the model in memory, and cut up as those are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from shardsmith.errors import CheckpointError, UsageError
from shardsmith.formats.dcp.beside_weights import recorded_names
from shardsmith.formats.models import ModelSource, TranslatedModel
from shardsmith.manifest.metadata import CheckpointMetadata, find_metadata
from shardsmith.name_maps.class_names import ClassNames, ComputedTensorsError
from shardsmith.name_maps.maps import find_name_map
from shardsmith.name_maps.matching import Alignment, match_names
from shardsmith.name_maps.recorded import RunNames
from shardsmith.name_maps.restored import RestoredModel
from shardsmith.name_maps.slices import Slice
from shardsmith.tensors.tensors import TensorSpec, is_turned

Matched = tuple[ModelSource, Alignment]


def matched_source(
    source: ModelSource,
    target: Mapping[str, TensorSpec],
    classes: ClassNames | None = None,
    names: str = "auto",
    config: dict[str, object] | None = None,
) -> Matched:
    """Return a model's tensors under a target's names, and what was done to the names. Reads no tensor.

    What has no place in the target is there under its own name, and nothing is made up for what the source lacks: the
    caller compares names and shapes.

    Args:
        source: The tensors to read.
        target: The tensors of files, or of a model in memory.
        classes: What the target's class says; None where no class is known.
        names: ``"identity"``: no tensor is cut up. ``"transformers"``: as transformers has them in files with the
            target's names. ``"auto"``: as the checkpoint records it, if that gives the target's names; else as
            transformers has them where that brings more of them together. Or a name map that a package offers.
        config: For such a map: the content of config.json.

    Raises:
        CheckpointError, UsageError: a map that was asked for cannot be used.
        ComputedTensorsError: the class computes what it writes, so that the two cannot be put side by side.
    """
    # A map of a package takes the model's own names: wrappers' segments are removed first.
    if names not in ("auto", "identity", "transformers"):
        plain = renamed(source, match_names(source.specs, {}, None, source.aliases))
        return _in_place(TranslatedModel(plain, find_name_map(names, config)), target, classes)
    # What the run recorded is certain, so it is tried before anything is guessed from a class.
    recorded = names_of_the_run(source, target, lambda: _manifest_of(source.path)) if names == "auto" else None
    if recorded is not None:
        return _in_place(TranslatedModel(source, recorded), target, classes)
    if names == "identity" or classes is None:
        return _in_place(source, target, None)
    if names == "transformers":
        return _cut(*_in_place(source, classes.specs, classes), target, classes)
    found = _in_place(source, target, classes)
    # Each other way must leave fewer tensors without a partner than the one before; a tie keeps the simpler way.
    fewest = _unplaced(found[0], target)
    # All names fit, but the class may write other elements of a tensor under one of them: then its cut decides.
    if not fewest and found[1].by_class and _is_rearranged(source, found[1], target, classes):
        return _cut(*_in_place(source, classes.specs, classes), target, classes)
    computed: ComputedTensorsError | None = None
    for way in _other_cuts(source, target, classes) if fewest and classes.is_known else ():
        try:
            other = way()
        except ComputedTensorsError as error:
            computed = error
            continue
        except (CheckpointError, UsageError):  # a model of this class is not cut up so, or lacks a part of a tensor
            continue
        if _unplaced(other[0], target) < fewest:
            found, fewest = other, _unplaced(other[0], target)
    if computed is not None and fewest:  # nothing is known of these tensors, neither good nor bad
        raise computed
    return found


def names_of_the_run(
    source: ModelSource, target: Mapping[str, TensorSpec], find_manifest: Callable[[], CheckpointMetadata | None]
) -> RunNames | None:
    """Return the names that a checkpoint records for files of its weights, if they are those of the target.

    Args:
        source: A model of the checkpoint.
        target: The tensors of files; without any, what the checkpoint records is taken.
        find_manifest: Returns that of the checkpoint, if it has one; called only where names are needed.

    Raises:
        CheckpointError: they cannot be read.
    """
    if not source.specs.keys() - target.keys() or (manifest := find_manifest()) is None:
        return None
    names = recorded_names(source.path, manifest)
    if names is None or (target and names.targets(source.specs).keys() - target.keys()):
        return None
    return names


def renamed(source: ModelSource | TranslatedModel, alignment: Alignment) -> ModelSource:
    """Return a model's tensors under their aligned names."""
    new = {old: name for name, old in alignment.keys.items()}
    aliases = {
        alias: new[source.aliases[old]] for alias, old in alignment.aliases.items() if source.aliases[old] in new
    }
    filled = frozenset(new[name] for name in source.filled if name in new)
    return ModelSource(
        source,
        alignment.keys,
        filled=filled,
        aliases=aliases,
        averages=source.averages,
        twins=source.twins,
        left_out=source.left_out,
    )


def _manifest_of(path: Path) -> CheckpointMetadata | None:
    try:
        return find_metadata(path)
    except CheckpointError:  # then the tensors are what the index says
        return None


def _in_place(
    source: ModelSource | TranslatedModel, target: Mapping[str, TensorSpec], classes: ClassNames | None
) -> Matched:
    found = match_names(source.specs, target, classes, source.aliases)
    return renamed(source, found), found


def _unplaced(source: ModelSource, target: Mapping[str, TensorSpec]) -> int:
    """How many tensors only another cut could bring together: those that are on one side, unless the other has none,
    and those with the dimensions of their partner in another order.
    """
    missing, extra = target.keys() - source.specs.keys(), source.specs.keys() - target.keys()
    turned = sum(is_turned(spec, target[name]) for name, spec in source.specs.items() if name in target)
    return turned + (len(missing) + len(extra) if missing and extra else 0)


def _is_rearranged(
    source: ModelSource, found: Alignment, target: Mapping[str, TensorSpec], classes: ClassNames
) -> bool:
    """Whether the class writes other values under a name than those of the tensor whose name becomes this one.

    Only if the source has the names in memory: from the files of one generation to those of another nothing is moved.

    Raises:
        UnsupportedFormatError: the class computes what it writes.
    """
    in_memory, memory = _in_place(source, classes.specs, classes)
    if memory.by_class:
        return False
    called = {own: name for name, own in memory.keys.items()}
    written = classes.to_files(target).targets(in_memory.specs)
    return any(
        name in written and written[name] != Slice.whole(in_memory.specs[called[own]])
        for name, own in found.keys.items()
    )


def _other_cuts(
    source: ModelSource, target: Mapping[str, TensorSpec], classes: ClassNames
) -> Iterator[Callable[[], Matched]]:
    """As the model has it in memory, cut up as in the target's files; or put together first; or both."""
    in_memory, found = _in_place(source, classes.specs, classes)
    yield lambda: _cut(in_memory, found, target, classes)
    yield lambda: _put_together(source, found, target, classes)
    yield lambda: _cut(*_put_together(source, found, classes.specs, classes), target, classes)


def _cut(in_memory: ModelSource, found: Alignment, target: Mapping[str, TensorSpec], classes: ClassNames) -> Matched:
    """Tensors as the model has them in memory, cut up as in the target's files."""
    translated = TranslatedModel(in_memory, classes.to_files(target))
    made, again = _in_place(translated, target, classes)
    return made, replace(found, keys=again.keys)


def _put_together(
    source: ModelSource, found: Alignment, target: Mapping[str, TensorSpec], classes: ClassNames
) -> Matched:
    """Tensors as they are in files, put together as the model has them in memory, under the target's names."""
    files = ModelSource(source, found.stripped, filled=frozenset(), aliases={})
    restored = RestoredModel(files, classes.to_files(files.specs), classes.specs, classes.tied)
    made, again = _in_place(ModelSource.whole(restored), target, classes)
    return made, replace(found, keys=again.keys)
