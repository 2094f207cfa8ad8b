"""What is looked at before and after TorchTitan loads a checkpoint, and said if it is wrong.

TorchTitan takes silently: an existing folder without a checkpoint in it, which turns ``initial_load_path`` off (0.2); a
step in that folder, which outranks it; weights that its adapter has no name for, and that keep their random values.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.fsdp import FSDPModule

from shardsmith.checkpoints import committed_steps
from shardsmith.dcp.index import read_index
from shardsmith.dcp.load import compare
from shardsmith.errors import CheckpointNotFoundError, MismatchError
from shardsmith.initial.buffer_reference import Fresh
from shardsmith.initial.live_weights import LiveWeights
from shardsmith.initial.load import poison_weights, prove_loaded
from shardsmith.layout import step_name
from shardsmith.ranks import Ranks

log = logging.getLogger(__name__)


class LoadWatch:
    """The loads of one run. Make it on all ranks at the same point."""

    def __init__(self, config: Any, model_parts: Sequence[nn.Module], sd_adapter: Any, folder: Path) -> None:
        """``config`` is TorchTitan's of its checkpoints, and ``folder`` where it has them."""
        self._path: str = config.initial_load_path or ""
        self._in_hf: bool = config.initial_load_in_hf
        self._parts = list(model_parts)
        self._adapter = sd_adapter
        self._folder = folder
        self._ranks = Ranks()

    def before(self, state_dict: Mapping[str, Any], checkpoint: Path, *, from_hf: bool) -> None:
        """TorchTitan is about to load from ``checkpoint``. All ranks; communicates through the store.

        Raises:
            MismatchError: what it asks for is not there, or is dropped on the way. Nothing was loaded.
            RankFailedError: the same, on all ranks.
        """
        if not self._is_initial(checkpoint):
            self._say_what_is_not_used(checkpoint)
            self._ranks.gather(f"looking at {checkpoint}", lambda: _refuse_weights_only(state_dict, checkpoint))
            return
        self._ranks.gather(f"looking at {checkpoint}", lambda: self._compare(state_dict, checkpoint, from_hf))
        poison_weights(self._parts)

    def after(self, checkpoint: Path, *, from_hf: bool) -> None:
        """It has loaded. All ranks; communicates.

        Raises:
            InitialLoadError: the model does not hold what the checkpoint does.
            MismatchError: tensors were left out.
        """
        if not self._is_initial(checkpoint):
            return
        if from_hf:
            self._ranks.gather(f"looking at what was loaded from {checkpoint}", lambda: self._refuse_poison(checkpoint))
        else:
            prove_loaded(self._parts, checkpoint, fresh=self._fresh(), ranks=self._ranks)

    def nothing_loaded(self) -> None:
        """It has loaded nothing. Raises CheckpointNotFoundError if it was told to."""
        if self._path or self._in_hf:
            wanted = f"initial_load_path={self._path}" if self._path else "initial_load_in_hf"
            raise CheckpointNotFoundError(
                self._folder,
                f"holds no checkpoint, but because it exists TorchTitan has ignored {wanted}: the run would start from "
                "random weights. Nothing was loaded; remove the empty folder",
            )

    def _is_initial(self, checkpoint: Path) -> bool:
        """Whether it is one to start from: somewhere else, or step 0, of which TorchTitan loads the model only."""
        return checkpoint.parent.resolve() != self._folder.resolve() or checkpoint.name == step_name(0)

    def _say_what_is_not_used(self, checkpoint: Path) -> None:
        unused = [self._path] if self._path else []
        if 0 in committed_steps(self._folder):
            unused.append(str(self._folder / step_name(0)))
        if unused and self._ranks.is_leader:
            log.warning(
                "%s outranks %s, which is not loaded. If it is of another run, remove it or choose another folder",
                checkpoint,
                " and ".join(unused),
            )

    def _compare(self, state_dict: Mapping[str, Any], checkpoint: Path, from_hf: bool) -> None:
        if from_hf:
            self._refuse_dropped(state_dict, checkpoint)
        else:
            compare(flatten_state_dict(dict(_values(state_dict)))[0], read_index(checkpoint), allow_cast=True)

    def _refuse_dropped(self, state_dict: Mapping[str, Any], checkpoint: Path) -> None:
        tensors = {name: value for name, value in state_dict.items() if isinstance(value, Tensor)}
        empty = {name: torch.empty(value.shape, dtype=value.dtype, device="meta") for name, value in tensors.items()}
        kept = self._adapter.from_hf(self._adapter.to_hf(dict(empty)))
        tied = LiveWeights(self._parts).tied
        lost = [name for name in tensors if name not in kept and tied.get(name) not in kept]
        if lost:
            adapter = type(self._adapter).__name__
            raise MismatchError(
                checkpoint,
                f"{len(lost)} of {len(tensors)} tensors have no name in it that {adapter} knows",
                [f"{name}: dropped by {adapter}.to_hf, would keep its random values" for name in lost],
                "Nothing was loaded. Convert it with shardsmith to-dcp, which loses none.",
            )

    def _refuse_poison(self, checkpoint: Path) -> None:
        live = LiveWeights(self._parts)
        left = [name for name in live.specs if any(look.poisoned for _, look in live.look(name))]
        if left:
            raise MismatchError(
                checkpoint,
                f"{len(left)} of {len(live.specs)} tensors were not, or not wholly, loaded from it",
                [f"{name}: still has what it was filled with before the load" for name in left],
                "The run must not start like this.",
            )

    def _fresh(self) -> Fresh | None:
        """How to make one of TorchTitan's own models anew, for its buffers; None for those of transformers."""
        config: Any = getattr(self._adapter, "model_config", None)
        if hasattr(config, "build"):
            return lambda: config.build()
        model: Any = self._parts[0]
        if hasattr(model, "model_args") and len(self._parts) == 1 and not hasattr(model, "config"):
            kind: Any = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
            return lambda: kind(model.model_args)
        return None


def is_remote(*paths: str) -> bool:
    """Whether any is a URI, such as gs://bucket, which TorchTitan reads and this package does not."""
    return any("://" in path for path in paths)


def without_absent(state_dict: dict[str, Any], checkpoint: Path, keys: Sequence[str]) -> dict[str, Any]:
    """Of what is to be loaded, all but those of ``keys`` that a checkpoint was made without: it had no average then."""
    stored = {key.split(".", 1)[0] for key in read_index(checkpoint).tensors}
    absent = [key for key in keys if key in state_dict and key not in stored]
    if absent:
        log.warning("%s holds no average: it starts from the weights that are loaded", checkpoint)
    return {key: value for key, value in state_dict.items() if key not in absent}


def newest_complete(folder: Path, newest: int) -> int:
    """The step to resume from: the newest one that is marked complete, if any is; else ``newest``."""
    complete = [step for step in committed_steps(folder) if step <= newest]
    if not complete or complete[-1] == newest:
        return newest
    log.warning(
        "%s was not saved to its end: it has no metadata.json. Resuming from %s; load_step takes it all the same",
        folder / step_name(newest),
        step_name(complete[-1]),
    )
    return complete[-1]


def _refuse_weights_only(state_dict: Mapping[str, Any], checkpoint: Path) -> None:
    """Raise MismatchError unless a step holds all that a run needs to go on, part by part."""
    index = read_index(checkpoint)
    stored = {key.split(".", 1)[0] for key in (*index.tensors, *index.objects)}
    absent = [key for key, value in state_dict.items() if not isinstance(value, Tensor) and key not in stored]
    if absent:
        raise MismatchError(
            checkpoint,
            "a run cannot go on from this step",
            [f"{key}: not in it" for key in absent],
            "Nothing was loaded. A last step has weights only unless checkpoint.last_save_model_only is off. Go on "
            "from an earlier one with checkpoint.load_step, or start a new run from this one with initial_load_path.",
        )


def _values(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """With what is in the stateful things in it."""
    return {k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in state_dict.items()}
