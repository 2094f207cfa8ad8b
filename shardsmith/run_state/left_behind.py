"""What a checkpoint has of the parts that a run takes up, and the run does not load: the next save would not have it.

torch fills what it is asked for, and says nothing of the rest.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch.distributed.checkpoint._nested_dict import flatten_state_dict

from shardsmith.errors import MismatchError
from shardsmith.formats.dcp.source import DcpSource
from shardsmith.ground import layout
from shardsmith.ground.printable import shown
from shardsmith.ground.ranks import Ranks
from shardsmith.tensors.checkpoint_keys import NOT_A_MODEL

log = logging.getLogger(__name__)

_STATE = "optimizer.state."
_ADVICE = (
    "Nothing was loaded. A resume needs the model, the average and the optimizer that were saved; resume(parts=[...]) "
    "takes only those parts that are as they were."
)
_REASONS = {
    "optimizer": "in the checkpoint, not kept by this run's optimizer: make it with the options that it had",
    "ema_model": "in the checkpoint, not averaged here: make EMA before freezing, with the buffers= that it had",
    "model": "in the checkpoint, not in this model",
}


@dataclass(frozen=True, slots=True)
class LeftBehind:
    """Of one rank."""

    keys: list[str]
    """Keys of tensors that it does not load."""
    main: frozenset[str]
    """Those that may be the model's."""
    unheld: frozenset[str]
    """Those that are a state of a parameter that no optimizer of the rank holds."""

    @classmethod
    def of(
        cls,
        state: Mapping[str, Any],
        tied: Mapping[str, str],
        saved: Collection[str],
        *,
        beside: Collection[str],
        nested: bool = False,
        held: Collection[str] = (),
    ) -> Self:
        """From what is to be filled.

        Args:
            state: As ``TrainState.collect`` gives it.
            tied: Alias -> kept FQN of this model.
            saved: Keys of the checkpoint's tensors.
            beside: Names of what is loaded beside the model, as it was saved.
            nested: Whether the model lies below ``model``.
            held: FQNs of the parameters of the optimizers.
        """
        wanted = flatten_state_dict({key: value for key, value in state.items() if key not in beside})[0]
        aside = (NOT_A_MODEL | {*beside}) - {"model"}
        has_main = "model" in state if nested else any(key.split(".", 1)[0] not in aside for key in wanted)
        parts = {"optimizer", "ema_model"} & state.keys()
        aliases = {prefix + alias for alias in tied for prefix in ("", "model.", layout.EMA_PREFIX)}
        keys, main = list[str](), set[str]()
        for key in saved:
            top = key.split(".", 1)[0]
            is_main = has_main and (top == "model" if nested else top not in aside)
            if key not in wanted and key not in aliases and (is_main or top in parts):
                keys.append(key)
                if is_main:
                    main.add(key)
        unheld = frozenset(key for key in keys if (name := parameter_of(key)) is not None and name not in held)
        return cls(keys, frozenset(main), unheld)


def parameter_of(key: str) -> str | None:
    """Return the FQN of the parameter whose state a key is of; None for other keys."""
    return key.removeprefix(_STATE).rpartition(".")[0] if key.startswith(_STATE) else None


def refuse_left_behind(ranks: Ranks, checkpoint: Path, find: Callable[[], LeftBehind]) -> None:
    """Raise MismatchError on all ranks if nobody loads something of the parts that are loaded. All ranks; communicates.

    The state of parameters that no optimizer of any rank holds is left out with a warning: the others go on exactly.
    """
    found: list[LeftBehind] = []

    def look() -> list[str]:
        found.append(find())
        return _of_model(checkpoint, found[0])

    phase = f"comparing {checkpoint.name} with the run"
    keys: list[str] = ranks.lead(phase, look)
    if not keys:
        return

    def answer() -> list[list[int]]:
        mine = found[0] if found else find()
        own = frozenset(mine.keys)
        lacked = [i for i, key in enumerate(keys) if key in own]
        return [lacked, [i for i in lacked if keys[i] in mine.unheld]]

    def common(answers: Sequence[list[list[int]]]) -> list[list[int]]:
        # With pipeline stages each rank loads its own.
        return [sorted(set[int].intersection(*(set(one[i]) for one in answers))) for i in (0, 1)]

    nobodys, unheld = ranks.agree(phase, answer, common, large=True)
    if problems := [f"{keys[i]}: {_reason(keys[i])}" for i in nobodys if i not in set(unheld)]:
        raise MismatchError(checkpoint, f"{len(problems)} entries are not loaded", problems, _ADVICE)
    if unheld and ranks.is_leader:
        names = [*dict.fromkeys(parameter_of(keys[i]) or "" for i in unheld)]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        log.warning(
            "%s holds the optimizer's state of %s%s, which no optimizer of this run holds: it is not loaded. If one is "
            "to train them later, add their group before resume()",
            shown(checkpoint),
            ", ".join(names[:3]),
            more,
        )


def _of_model(checkpoint: Path, found: LeftBehind) -> list[str]:
    """Without what lies in a dict of its own, such as a part that this run does not have."""
    if not found.main or not (checkpoint / layout.DCP_INDEX_FILE).exists():
        return found.keys
    with contextlib.closing(DcpSource(checkpoint, to_load=True)) as source:
        paths = {key: source.index.containers.get(key, (key,)) for key in found.main}
    return [key for key in found.keys if key not in paths or len(paths[key]) == 1 or paths[key][0] == "model"]


def _reason(key: str) -> str:
    return _REASONS.get(key.split(".", 1)[0], _REASONS["model"])
