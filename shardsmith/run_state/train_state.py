"""All state of a training run as one state dict for ``torch.distributed.checkpoint``, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from shardsmith.errors import UsageError
from shardsmith.model_keys import NOT_A_MODEL
from shardsmith.run_state.average import Average
from shardsmith.run_state.fsdp1_hybrid import hybrid_groups_have_a_source
from shardsmith.run_state.known_state import FLAT_OPTIMIZER, KnownState, ask_torch
from shardsmith.run_state.rng import rng_state, set_rng_state
from shardsmith.run_state.save import RNG, Contents

_OURS = frozenset({"model", "optimizer", "lr_scheduler", "ema_model", "ema_state", "train_state", RNG})


class TrainState:
    """What a run consists of: model, average, optimizer, scheduler, random number generators, and more.

    The top-level keys are those that TorchTitan uses: the model's FQNs as they are, ``optimizer.*``,
    ``lr_scheduler.*``, ``train_state.*``; ours beside them are ``ema_model.*``, ``ema_state.*`` and ``rng.*``.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: Optimizer | Iterable[Optimizer] | None = None,
        scheduler: Stateful | None = None,
        ema: Average | None = None,
        stateful: Mapping[str, Stateful] | None = None,
        nested: bool = False,
        rank: int = 0,
    ) -> None:
        """``nested`` puts the model's keys under ``model.``. Raises UsageError if a name in ``stateful`` is taken."""
        self.ema = ema
        self._model = model
        self._optimizers = optimizer_list(optimizer)
        self._scheduler = scheduler
        self._stateful = dict(stateful or {})
        self._nested = nested
        self._known = KnownState(model, self._optimizers)
        self._rng_key = f"rank-{rank}"
        if taken := sorted(_OURS & self._stateful.keys()):
            raise UsageError(f"stateful: {', '.join(taken)} is used by the checkpoint itself; choose another name")

    def collect(self, step: int, *, with_rng: bool = True, with_main: bool = True, to_load: bool = False) -> Contents:
        """The live state, not copied. All ranks; communicates only under FSDP1.

        Args:
            with_main: Whether to take the main weights, too.
            to_load: Whether it is to be filled; otherwise it is only to be read.

        Raises:
            UsageError: the model's names cannot be told from the rest of the checkpoint.
        """
        found = ask_torch(self._model, self._optimizers) if to_load else self._known.state_dicts()
        main = found.model
        state: dict[str, Any] = {"model": main} if self._nested else self._flat(main)
        if not with_main:
            state = {}
        if self._optimizers:
            state["optimizer"] = found.optimizer
        if self._scheduler is not None:
            state["lr_scheduler"] = self._scheduler.state_dict()
        if self.ema is not None:
            state["ema_state"] = self.ema.state_dict()
            state["ema_model"] = state["ema_state"].pop("model")
        if with_rng:
            state[RNG] = {self._rng_key: rng_state()}
        state["train_state"] = {"step": torch.tensor(step)}
        state |= {name: thing.state_dict() for name, thing in self._stateful.items()}
        facts = self.ema.facts() if self.ema is not None else None
        return Contents(step=step, state_dict=state, ema=facts, tied=found.tied, mesh=_mesh(main))

    def restore(self, state: Mapping[str, Any]) -> None:
        """Hand loaded state, in the form that ``collect`` gave, back to its owners. All ranks; communicates (FSDP1)."""
        aside = _OURS | self._stateful.keys()
        flat = {name: value for name, value in state.items() if name not in aside}
        main = state.get("model", {}) if self._nested else flat
        if main:
            set_model_state_dict(self._model, main)
        if self._optimizers:
            with hybrid_groups_have_a_source(self._model):
                set_optimizer_state_dict(self._model, self._optimizers, state["optimizer"], options=FLAT_OPTIMIZER)
        if self._scheduler is not None:
            self._scheduler.load_state_dict(state["lr_scheduler"])
        if self.ema is not None:
            self.ema.load_state_dict({**state["ema_state"], "model": state["ema_model"]})
        for name, thing in self._stateful.items():
            thing.load_state_dict(state[name])
        if RNG in state:
            set_rng_state(state[RNG][self._rng_key])

    def _flat(self, main: Mapping[str, Any]) -> dict[str, Any]:
        reserved = NOT_A_MODEL | self._stateful.keys()
        if taken := sorted(name for name in main if name.split(".", 1)[0] in reserved):
            raise UsageError(
                f"the model has tensors under names that a checkpoint uses for other things: {', '.join(taken)}. "
                'Nothing was written. Pass layout="nested", which keeps the model under a key of its own.'
            )
        return dict(main)


def optimizer_list(optimizer: Optimizer | Iterable[Optimizer] | None) -> list[Optimizer]:
    """All of the optimizers."""
    if optimizer is None:
        return []
    return [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)


def _mesh(state: Mapping[str, Any]) -> dict[str, Any] | None:
    """Shape and dimension names of the first DTensor's mesh."""
    for value in state.values():
        if isinstance(value, DTensor):
            names = value.device_mesh.mesh_dim_names
            return {"shape": list(value.device_mesh.mesh.shape), "dim_names": list(names) if names else None}
    return None
