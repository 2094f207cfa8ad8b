"""The average as two of TorchTitan's states, which go into its step folders as ``ema_model.*`` and ``ema_state.*``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.distributed.checkpoint.stateful import Stateful

from shardsmith.errors import UsageError
from shardsmith.hooks import EMA

MODEL, STATE = "ema_model", "ema_state"


def average_states(ema: EMA, *, allow_other_decay: bool = False) -> dict[str, Stateful]:
    """Return the two by key. Loading takes effect when both have been loaded, in any order.

    Raises, when both have been loaded, UsageError if the average was kept with another decay.
    """
    loaded: dict[str, Mapping[str, Any]] = {}

    def load(key: str, values: Mapping[str, Any]) -> None:
        loaded[key] = values
        # Only with both: averages without their counters would go on with a wrong number of updates.
        if loaded.keys() == {MODEL, STATE}:
            _refuse_other_decay(ema, loaded[STATE], allow_other_decay)
            ema.load_state_dict({**loaded[STATE], "model": loaded[MODEL]}, allow_other_decay=allow_other_decay)
            loaded.clear()

    return {MODEL: _Averages(ema, load), STATE: _Counters(ema, load)}


def _refuse_other_decay(ema: EMA, counters: Mapping[str, Any], allowed: bool) -> None:
    saved = counters.get("decay")
    if saved is not None and not allowed and float(saved) != ema.decay:
        raise UsageError(
            f"checkpoint_hooks: the average in this step was kept with decay {float(saved):g}, ema_decay is "
            f"{ema.decay:g}. Set ema_decay={float(saved):g}, or ema_allow_other_decay to go on with it, or start it "
            "anew from the weights with --checkpoint.exclude_from_loading=ema_model,ema_state"
        )


class _Averages(Stateful):
    """The averaged weights by FQN."""

    def __init__(self, ema: EMA, load: Any) -> None:
        self._ema = ema
        self._load = load

    def state_dict(self) -> dict[str, Any]:
        return dict(self._ema.model_state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._load(MODEL, state_dict)


class _Counters(_Averages):
    """What else the average needs to go on."""

    def state_dict(self) -> dict[str, Any]:
        return dict(self._ema.counters())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._load(STATE, state_dict)
