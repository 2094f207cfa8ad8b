"""What a config may say instead, so that it describes certain tensors: one kind of change a function.

Each function takes the config as it is and yields other ones with a note for people; which of them is better is up to
the caller.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from shardsmith.hf.config_attempt import NOT_OF_THE_MODEL, TIE, Attempt, Excused, subsets
from shardsmith.hf.config_entries import OF_THE_HEAD, QUANTIZATION, Config, Path, dotted, entries, part_at, with_values
from shardsmith.tensors.tensors import TensorSpec

AS_LIVE = "as in the config of the live model"
OF_THE_LIVE_MODEL = "as the live model has it, and not the base model"
_KIND, _LABELS = "model_type", "id2label"
_CLASSES, _TIMM_DETAILS, _TIMM_LABELS = "num_classes", "pretrained_cfg", ("label_names", "label_descriptions")
_BY_TENSORS = NOT_OF_THE_MODEL | {TIE, "auto_map", "return_dict"}
"""Entries that the tensors decide, or that say nothing of what the model computes."""


def unquantized(state: Attempt, _: Excused) -> Iterator[tuple[Config, str]]:
    """Take out what is said of a quantisation that no tensor has."""
    if state.is_plain_but_quantized:
        changed = copy.deepcopy(dict(state.config))
        for path, _value in list(entries(changed)):
            if path[-1] == QUANTIZATION:
                part_at(changed, path[:-1]).pop(QUANTIZATION, None)
        yield changed, f"{QUANTIZATION} was taken out: no tensor is quantized"


def untied(state: Attempt, _: Excused, *, live: Config) -> Iterator[tuple[Config, str]]:
    """Say of what the class ties and the files do not that it is not tied; all else stays as it was."""
    said = dict(entries(live))
    for chosen in state.flags_off():
        changed = with_values(state.config, dict.fromkeys(chosen, False))
        beside = state.beside_the_tie(changed)
        if beside.keys() <= said.keys():
            alias, kept = next(iter(state.untied.items()))
            note = f"{dotted(chosen)}: false, for {alias} is not {kept}"
            yield with_values(changed, {path: said[path] for path in beside}), note


def resized(state: Attempt, excused: Excused) -> Iterator[tuple[Config, str]]:
    """Say another size of a vocabulary, where all tensors that have its size have the other one."""
    if state.fit is None or state.model_class is None or not state.problems(excused):
        return
    sizes = {pair for given, wanted in state.fit.shapes.values() for pair in changed_sizes(wanted, given).items()}
    for old, new in sorted(sizes):
        said = entries(state.model_class.effective_config)
        paths = [path for path, value in said if "vocab" in path[-1] and value == old and value is not True]
        for chosen in map(functools.partial(_with_its_twins, state, excused, new, paths), subsets(paths)):
            yield with_values(state.config, dict.fromkeys(chosen, new)), f"{dotted(chosen)}: {new} instead of {old}"


def _with_its_twins(
    state: Attempt, excused: Excused, new: int, paths: Sequence[Path], chosen: Sequence[Path]
) -> Sequence[Path]:
    """Return what lies beside the chosen entries as well, if the tensors allow it: a shared decoder's vocabulary."""

    def count(changed: Sequence[Path]) -> int:
        return Attempt.of(with_values(state.config, dict.fromkeys(changed, new)), state.specs, state.separate).count(
            excused
        )

    together = [path for path in paths if any(path[:-1] == one[:-1] for one in chosen)]
    return together if len(together) > len(chosen) and count(together) <= count(chosen) else chosen


def as_live(state: Attempt, excused: Excused, live: Config) -> Iterator[tuple[Config, str]]:
    """Say what the config of the live model says: of the head first, then everything about the model."""
    if not live or state.model_class is None or not state.problems(excused):
        return
    kind = live.get("architectures")
    if kind and kind != state.config.get("architectures"):
        state = Attempt.of({**state.config, "architectures": kind}, state.specs, state.separate)
        yield state.config, f"architectures: {kind[0]}, as the live model"
    said = dict(entries(live))
    differing = {
        path: said[path]
        for path, value in entries(state.effective)
        if path in said and said[path] != value and path[-1] not in NOT_OF_THE_MODEL
    }
    of_head = {path: value for path, value in differing.items() if path[-1] in OF_THE_HEAD or "vocab" in path[-1]}
    for chosen, source in ((of_head, "as the live model"), (differing, AS_LIVE)):
        if chosen:
            yield with_values(state.config, chosen), f"{dotted(chosen)} {source}"


def settings_of(state: Attempt, live: Config) -> dict[Path, Any]:
    """Return what the config of the live model says otherwise and no tensor shows: rotary angles, names of labels.

    The library's own save writes what the live model says, for that is what was trained.
    """
    return dict(_differing(state.effective, live))


def in_modern_spelling(state: Attempt) -> Config:
    """Return the config, or all of it as the class spells it today, where some of it has an older spelling.

    A reader might take an old ``rope_theta`` and another the ``rope_parameters`` that are written beside it.
    """
    spelled = {path for path, _ in entries(state.effective)} | {(QUANTIZATION,), ("torch_dtype",), ("auto_map",)}
    if all(path in spelled or path[0] in (QUANTIZATION, "auto_map") for path, _ in entries(state.config)):
        return state.config
    kept = {key: value for key, value in state.config.items() if (key,) in spelled}
    return {**kept, **{key: value for key, value in state.effective.items() if not key.startswith("_")}}


def _differing(ours: Config, live: Config, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    if len({ours.get(_KIND), live.get(_KIND)} - {None}) > 1:  # of a model inside the one that this config describes
        return
    for key, value in ours.items():
        # ``output_...`` is what a forward gives back beside its result.
        if key not in live or key in _BY_TENSORS or "vocab" in key or key.startswith(("_", "output_")):
            continue
        if isinstance(value, Mapping) and isinstance(live[key], Mapping) and key.endswith("config"):
            yield from _differing(value, live[key], (*path, key))
        elif live[key] != value:
            yield (*path, key), live[key]


def relabelled(state: Attempt, excused: Excused) -> Iterator[tuple[Config, str]]:
    """Number the labels of a head for another number of them, whose names nobody knows, as transformers does it."""
    if state.fit is None or state.model_class is None or not state.problems(excused):
        return
    sizes = {pair for given, wanted in state.fit.shapes.values() for pair in changed_sizes(wanted, given).items()}
    labels = {path[:-1]: value for path, value in entries(state.model_class.effective_config) if path[-1] == _LABELS}
    for place, known in labels.items():
        for new in sorted(new for old, new in sizes if old == len(known or ())):
            numbered = {str(i): f"LABEL_{i}" for i in range(new)}
            values: dict[Path, Any] = {
                (*place, _LABELS): numbered,
                (*place, "label2id"): {name: int(i) for i, name in numbered.items()},
            }
            if "num_labels" in part_at(copy.deepcopy(dict(state.config)), place):
                values[*place, "num_labels"] = new
            yield (
                with_values(state.config, values),
                f"{'.'.join((*place, _LABELS))}: {new} labels instead of {len(known)}",
            )


def with_classes_of(config: Config, specs: Mapping[str, TensorSpec]) -> tuple[Config, str, frozenset[str]]:
    """Number the classes of a config in timm's form as its head has them, which the config names.

    timm's ``load_model_config_from_hf`` takes what is said at the top; its builder takes ``model_args``.

    Returns:
        The config; a note for people, empty without a change; the tensors of the head, if they explain the change.
    """
    known = config.get(_CLASSES)
    details = config.get(_TIMM_DETAILS, config)  # all in one dict, as older versions wrote it
    if not isinstance(config.get("architecture"), str) or type(known) is not int or not isinstance(details, Mapping):
        return config, "", frozenset()
    heads = details.get("classifier")
    # Several where a model is distilled.
    modules = [heads] if isinstance(heads, str) else [name for name in heads or () if isinstance(name, str)]
    held = {name for module in modules for name in (f"{module}.weight", f"{module}.bias") if name in specs}
    rows = {specs[name].shape[0] for name in held if specs[name].shape}
    if len(rows) != 1 or (new := rows.pop()) == known:
        return config, "", frozenset()
    places: tuple[Path, ...] = ((), ("model_args",), (_TIMM_DETAILS,))
    paths = [path for path, _ in entries(config) if path[-1] == _CLASSES and path[:-1] in places]
    changed = with_values(config, dict.fromkeys(paths, new))
    labels = [path for path, _ in entries(config) if path[-1] in _TIMM_LABELS and path[:-1] in places]
    for path in labels:
        del part_at(changed, path[:-1])[path[-1]]
    note = f"{dotted(paths)}: {new} instead of {known}"
    return changed, note + (f"; without {dotted(labels)}, which are of {known}" if labels else ""), frozenset(held)


def changed_sizes(one: Sequence[int], other: Sequence[int]) -> dict[int, int]:
    """Return size in the first -> size in the second, where two shapes differ."""
    return {a: b for a, b in zip(one, other, strict=False) if a != b} if len(one) == len(other) else {}
