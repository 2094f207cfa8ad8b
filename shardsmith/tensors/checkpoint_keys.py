"""Which keys of a DCP directory are a model's weights, and what the model calls them.

    layers.0.w                       flat: TorchTitan >= 0.2, and ours
    model.layers.0.w                 nested under "model": torch's tutorials, accelerate, older TorchTitan, flame
    app.model.layers.0.w             nested deeper: torch's AppState example
    ema_model.layers.0.w             our average
    ema.state.layers.0.w.ema_params  TorchTitan's average; also with the name of one of several: .ema_params.0.999
    model_ema.layers.0.w             anybody's average: a dict that is called one and holds the model's names

A name that begins with ``model.`` may be either of the first two, so the names alone don't decide: DCP's index keeps
the path of every key in the dict that was saved, and that does.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

from shardsmith.ground import layout
from shardsmith.tensors.wrappers import without_segments

MAIN = "main"
EMA = "ema"

NOT_A_MODEL = frozenset(
    [
        "optimizer",
        "optim",
        "lr_scheduler",
        "scheduler",
        "dataloader",
        "data_status",
        "train_state",
        "rng",
        "ema",
        "ema_model",
        "ema_optimizer",
        "ema_state",
    ]
)
"""First path elements of what is saved beside a model."""

_TITAN_EMA = re.compile(r"(ema|ema_optimizer)\.state\.(?P<fqn>.+?)\.ema_params(\.(?P<average>.+))?")
_AVERAGE_WORDS = frozenset({"ema", "ewma", "avg", "average", "averaged", "swa", "polyak", "shadow"})
# Of ``model_ema``, ``modelEma``, ``EMAModel`` and ``EmaModel`` alike.
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_MAX_DEPTH = 3
"""Path elements in front of an average's names, at most: ``callbacks.ema.module``."""
_NEVER_AVERAGES = frozenset({"optimizer", "optim", "lr_scheduler", "scheduler", "dataloader", "data_status", "rng"})
# Of several, as Lightning saves them also where there is one.
_NUMBERED = re.compile(r"(optimizer|optim|lr_scheduler|scheduler)_[0-9]+")

KeyPath = tuple[str | int, ...]


def find_models(
    keys: Iterable[str], paths: Mapping[str, KeyPath], average: str | None = None
) -> dict[str, dict[str, str]]:
    """Find the models among the tensors of a checkpoint: model name -> FQN -> key. One without tensors is left out.

    Args:
        keys: Keys of tensors, in order.
        paths: Key -> path in the nested dict that was saved; a missing one means the dict was flat.
        average: Which one, where there are several: one of ``find_averages``, or the name of any dict that holds
            tensors under the model's names. None takes the first.
    """
    keys = list(keys)
    main = _main(keys, paths)
    known = _known_averages(keys, main)
    copies = _copies(_without(keys, known, paths), main, lambda dicts: _is_average(dicts) or ".".join(dicts) == average)
    fqns = _FqnFinder(main)
    names = {fqns.find(name, EMA) or name: key for name, key in _average(known, copies, average).items()}
    # What an average or a twin holds is not main, even where a flat key could be read as one of the model's.
    beside = {key for found in (*known.values(), *copies.values()) for key in found.values()}
    # Of a dict that is an average nothing is main: also not tensors for which the model has no name.
    dicts = tuple(f"{_upto_average(path)}." for path in copies if _is_average(path.split(".")))
    models = {
        MAIN: {fqn: key for fqn, key in main.items() if key not in beside and not fqn.startswith(dicts)},
        EMA: names,
    }
    return {name: found for name, found in models.items() if found}


def find_averages(keys: Iterable[str], paths: Mapping[str, KeyPath]) -> list[str]:
    """Name a checkpoint's averages, where they have names, in order.

    The name of one of TorchTitan's several is its own (``0.999``); of one that lies in a dict of its own the path of
    that dict (``model_ema``, ``callbacks.ema``). Our own has none.
    """
    keys = list(keys)
    main = _main(keys, paths)
    known = _known_averages(keys, main)
    copies = _copies(_without(keys, known, paths), main, _is_average)
    return [name for name in (*known, *copies) if name]


def find_twins(keys: Iterable[str], paths: Mapping[str, KeyPath]) -> list[str]:
    """Name the dicts beside the model that hold tensors under its names and are not called an average: a teacher."""
    keys = list(keys)
    main = _main(keys, paths)
    known = _known_averages(keys, main)
    of_main = set(main.values())
    beside = {key: path for key, path in _without(keys, known, paths).items() if key not in of_main}
    return list(_copies(beside, main, lambda dicts: not _is_average(dicts)))


def find_lost_averages(keys: Iterable[str], paths: Mapping[str, KeyPath]) -> list[str]:
    """Name the dicts that are called an average and hold no tensor under the model's names: a list of them, for one.

    A single tensor, such as a count of updates, is no average.
    """
    keys = list(keys)
    main = _main(keys, paths)
    known = _known_averages(keys, main)
    copies = _copies(_without(keys, known, paths), main, _is_average)
    of_models = {key for found in (main, *known.values(), *copies.values()) for key in found.values()}
    # A part of an average that is found is not lost.
    found = {dicts for key in of_models if (dicts := average_above(paths.get(key, ())))}
    counts = Counter(dicts for key in keys if key not in of_models and (dicts := average_above(paths.get(key, ()))))
    return [dicts for dicts, count in counts.items() if dicts not in found and count > 1]


def average_above(path: KeyPath) -> str | None:
    """Return the path of the dict that is called an average and that a tensor lies in; None if it lies in none."""
    segments = [str(segment) for segment in path[:-1][:_MAX_DEPTH]]
    if segments and kind_of(segments[0]) in _NEVER_AVERAGES:
        return None
    depth = next((i for i, segment in enumerate(segments) if _is_average([segment])), None)
    return None if depth is None else ".".join(segments[: depth + 1])


def find_strays(keys: Iterable[str], paths: Mapping[str, KeyPath], average: str | None = None) -> list[str]:
    """List the keys in the dict of an average, chosen as by ``find_models``, for which the model has no name."""
    keys = list(keys)
    main = _main(keys, paths)
    known = _known_averages(keys, main)
    copies = _copies(_without(keys, known, paths), main, lambda dicts: _is_average(dicts) or ".".join(dicts) == average)
    names = _average(known, copies, average)
    path = next((path for path, found in copies.items() if found == names), None)
    joined = {key: ".".join(map(str, paths.get(key, (key,)))) for key in keys} | {key: n for n, key in main.items()}
    return [key for key in keys if path and joined[key].startswith(f"{path}.") and key not in copies[path].values()]


def _main(keys: list[str], paths: Mapping[str, KeyPath]) -> dict[str, str]:
    """FQN -> key of all that is not known to lie beside the model; averages in the model's own dict included."""
    paths_of = {key: paths.get(key, (key,)) for key in keys}
    # One key below a dict called "model" decides for all: then the flat ones lie beside the model.
    nested = any(_model_depth(path) is not None for path in paths_of.values())
    named = {key: _nested_fqn(path) if nested else _flat_fqn(key) for key, path in paths_of.items()}
    return {fqn: key for key, fqn in named.items() if fqn is not None}


def _known_averages(keys: list[str], main: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Ours and TorchTitan's: name, "" where it has none -> FQN -> key."""
    found: dict[str, dict[str, str]] = {}
    ours = [key for key in keys if key.startswith(layout.EMA_PREFIX)]
    # Somebody else's of the same name has the model in a wrapper: "module" of torch's AveragedModel, for one.
    is_ours = not main or any(key.removeprefix(layout.EMA_PREFIX) in main for key in ours)
    for key in keys:
        if is_ours and key.startswith(layout.EMA_PREFIX):
            found.setdefault("", {})[key.removeprefix(layout.EMA_PREFIX)] = key
        elif match := _TITAN_EMA.fullmatch(key):
            found.setdefault(match["average"] or "", {})[match["fqn"]] = key
    return found


def _average(
    known: Mapping[str, dict[str, str]], copies: Mapping[str, dict[str, str]], wanted: str | None
) -> dict[str, str]:
    """FQN -> key of one average: the wanted one, else ours or TorchTitan's first, else the first that there is."""
    if wanted is None and not known:
        return next(iter(copies.values()), {})
    if wanted is not None and wanted not in known:
        return copies.get(wanted, {})
    chosen = wanted or next(filter(None, known), "")
    return {**known.get("", {}), **known.get(chosen, {})}  # TorchTitan's nameless values belong to each of its averages


def _without(keys: list[str], known: Mapping[str, dict[str, str]], paths: Mapping[str, KeyPath]) -> dict[str, KeyPath]:
    taken = {key for names in known.values() for key in names.values()}
    return {key: paths.get(key, (key,)) for key in keys if key not in taken}


def _copies(
    paths: Mapping[str, KeyPath], main: Mapping[str, str], is_wanted: Callable[[list[str]], bool]
) -> dict[str, dict[str, str]]:
    """Path of each wanted dict that holds tensors under the model's names -> FQN -> key."""
    fqns = _FqnFinder(main)
    of_main = {key: fqn for fqn, key in main.items()}
    groups: dict[str, dict[str, str]] = {}
    for key, path in paths.items():
        segments = (of_main.get(key) or ".".join(map(str, path))).split(".")
        # Moments of an optimizer are under the model's names, too.
        if kind_of(segments[0]) in _NEVER_AVERAGES:
            continue
        # The shortest prefix first: what is behind it must be a name of the model.
        for depth in range(1, min(_MAX_DEPTH, len(segments) - 1) + 1):
            prefix = ".".join(segments[:depth])
            fqn = fqns.find(".".join(segments[depth:]), prefix) if is_wanted(segments[:depth]) else None
            if fqn is not None:
                groups.setdefault(prefix, {})[fqn] = key
                break
    return groups


def _is_average(dicts: list[str]) -> bool:
    return any(word.lower() in _AVERAGE_WORDS for name in dicts for word in _WORD.findall(name))


def _upto_average(path: str) -> str:
    """Return the part of a path of dicts that ends with the first that is called an average."""
    segments = path.split(".")
    depth = next(i for i, segment in enumerate(segments) if _is_average([segment]))
    return ".".join(segments[: depth + 1])


class _FqnFinder:
    """The model's FQN of a name that an average has: the same, but perhaps with other wrappers, without the attribute
    that the model is in, or without dots (what is registered as a buffer cannot have any)."""

    def __init__(self, main: Iterable[str]) -> None:
        # An average in the model's own dict would make each of its names one of the model's.
        self._main = {fqn for fqn in main if not _is_average([_root(fqn)])}
        self._known: dict[str, str] = {}
        plain = {fqn for fqn in self._main if not _is_average(fqn.split(".")[:_MAX_DEPTH])}
        # First without wrappers, then with less and less in front. An earlier form keeps a name; one that two tensors
        # share is not used.
        for names in [*_forms(plain), *_forms(self._main - plain)]:
            counts = Counter(names.values())
            self._known |= {n: fqn for fqn, n in names.items() if counts[n] == 1 and n not in self._known}
        self._plain: dict[str, str] = {fqn.replace(".", ""): fqn for fqn in self._main if "." in fqn}
        # The averages' own names come last, and are not to hide those of the model.
        for name, fqn in self._known.items():
            self._plain.setdefault(name.replace(".", ""), fqn)

    def find(self, name: str, prefix: str) -> str | None:
        """Return None for a name that the model lacks. ``prefix`` stood in front of it: no tensor averages itself."""
        found = [name if name in self._main else self._known.get(without_segments(name))]
        if "." not in name:
            found.append(self._plain.get(name))
        # A name that stands below the prefix is the tensor itself, or another one of the same dict.
        return next((fqn for fqn in found if fqn is not None and not fqn.startswith(f"{prefix}.")), None)


def _forms(fqns: Iterable[str]) -> Iterator[dict[str, str]]:
    """FQN -> name without wrappers; then without what all begin with, a segment at a time; at last without one more."""
    names = {fqn: without_segments(fqn) for fqn in fqns}
    yield names
    for _ in range(_MAX_DEPTH):
        is_shared = len({_root(name) for name in names.values()}) == 1
        names = {fqn: name.split(".", 1)[1] for fqn, name in names.items() if "." in name}
        yield names
        if not is_shared:
            return


def kind_of(root: str | int) -> str | int:
    """Return the name of a dict beside the model without its number: ``optimizer`` for ``optimizer_0``."""
    match = _NUMBERED.fullmatch(str(root))
    return match[1] if match else root


def _root(name: str) -> str:
    return name.split(".", 1)[0]


def _flat_fqn(key: str) -> str | None:
    return None if kind_of(_root(key)) in NOT_A_MODEL else key


def _nested_fqn(path: KeyPath) -> str | None:
    depth = _model_depth(path)
    return None if depth is None else ".".join(map(str, path[depth:]))


def _model_depth(path: KeyPath) -> int | None:
    """How many elements of the path lead to a dict that was saved under the name ``model``."""
    containers = path[:-1]
    if not containers or kind_of(containers[0]) in NOT_A_MODEL or "model" not in containers:
        return None
    return containers.index("model") + 1
