"""Which keys of a DCP directory are a model's weights, and what the model calls them.

    layers.0.w                       flat: TorchTitan >= 0.2, and ours
    model.layers.0.w                 nested under "model": torch's tutorials, accelerate, older TorchTitan, flame
    app.model.layers.0.w             nested deeper: torch's AppState example
    ema_model.layers.0.w             our average
    ema.state.layers.0.w.ema_params  TorchTitan's average; also with the name of one of several: .ema_params.0.999

A name that begins with ``model.`` may be either of the first two, so the names alone don't decide: DCP's index keeps
the path of every key in the dict that was saved, and that does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from shardsmith import layout

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

KeyPath = tuple[str | int, ...]


def find_models(
    keys: Iterable[str], paths: Mapping[str, KeyPath], average: str | None = None
) -> dict[str, dict[str, str]]:
    """The models among the tensors of a checkpoint: model name -> FQN -> key. A model without tensors is left out.

    Args:
        keys: Keys of tensors, in order.
        paths: Key -> path in the nested dict that was saved; a missing one means the dict was flat.
        average: Which one, where there are several: one of ``find_averages``. None takes the first.
    """
    keys = list(keys)
    chosen = average or next(iter(find_averages(keys)), None)
    models: dict[str, dict[str, str]] = {MAIN: {}, EMA: {}}
    paths_of = {key: paths.get(key, (key,)) for key in keys}
    nested = any(_model_depth(path) is not None for path in paths_of.values())
    for key, path in paths_of.items():
        if (averaged := _ema_fqn(key, chosen)) is not None:
            if averaged:
                models[EMA][averaged] = key
        elif (fqn := _nested_fqn(path) if nested else _flat_fqn(key)) is not None:
            models[MAIN][fqn] = key
    return {name: names for name, names in models.items() if names}


def find_averages(keys: Iterable[str]) -> list[str]:
    """The names of a checkpoint's averages, where they have names; in order."""
    matches = (_TITAN_EMA.fullmatch(key) for key in keys)
    return list(dict.fromkeys(match["average"] for match in matches if match and match["average"]))


def _ema_fqn(key: str, average: str | None) -> str | None:
    """What a model calls an averaged tensor; "" if it is one of another average, None if it is none."""
    if key.startswith(layout.EMA_PREFIX):
        return key.removeprefix(layout.EMA_PREFIX)
    match = _TITAN_EMA.fullmatch(key)
    if match is None:
        return None
    return match["fqn"] if match["average"] in (None, average) else ""


def _flat_fqn(key: str) -> str | None:
    return None if key.split(".", 1)[0] in NOT_A_MODEL else key


def _nested_fqn(path: KeyPath) -> str | None:
    depth = _model_depth(path)
    return None if depth is None else ".".join(map(str, path[depth:]))


def _model_depth(path: KeyPath) -> int | None:
    """How many elements of the path lead to a dict that was saved under the name ``model``."""
    containers = path[:-1]
    if not containers or containers[0] in NOT_A_MODEL or "model" not in containers:
        return None
    return containers.index("model") + 1
