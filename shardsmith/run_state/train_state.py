"""All state of a training run as one state dict for ``torch.distributed.checkpoint``, and back."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from shardsmith.errors import UsageError
from shardsmith.hf.live_config import RecordedSettings
from shardsmith.run_state.alike import tensors_of
from shardsmith.run_state.average import Average
from shardsmith.run_state.contents import RNG, Contents
from shardsmith.run_state.fsdp1_hybrid import hybrid_groups_have_a_source
from shardsmith.run_state.known_state import FLAT_OPTIMIZER, KnownState, StateDicts, ask_torch
from shardsmith.run_state.left_behind import LeftBehind, parameter_of
from shardsmith.run_state.optimizers import GroupOptions, check_optimizers, finding_parameters_fast
from shardsmith.run_state.rank_states import PerRank
from shardsmith.run_state.readable import made_readable
from shardsmith.run_state.renamed_model import write_model
from shardsmith.run_state.replaced_settings import replacements_told, tell_mixed
from shardsmith.run_state.rng import rng_state, set_rng_state
from shardsmith.run_state.saved_structure import INT_KEYS, with_text_keys
from shardsmith.run_state.unused_parameters import UnusedParameters, saved_states_made
from shardsmith.tensors.checkpoint_keys import NOT_A_MODEL, KeyPath
from shardsmith.tensors.fqn import clean_fqn, inside_fabric

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
        stateful: Mapping[str, Stateful | PerRank] | None = None,
        nested: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """``nested`` puts the model's keys under ``model.``. Raises UsageError if a name in ``stateful`` is taken."""
        self.ema = ema
        self._model = model = inside_fabric(model)
        self._optimizers = optimizer_list(optimizer)
        self._scheduler = scheduler
        self._stateful = dict(stateful or {})
        self._nested = nested
        self._known = KnownState(model, self._optimizers)
        self._settings = RecordedSettings()
        self._options = GroupOptions(model, self._optimizers)
        self._rank = rank
        self._size = world_size
        self._rng_key = f"rank-{rank}"
        self._rank_states: dict[str, Any] = {}  # read, and not yet handed back
        if taken := sorted((_OURS | {"scheduler", "ema"}) & self._stateful.keys()):
            raise UsageError(f"stateful: {', '.join(taken)} is used by the checkpoint itself; choose another name")

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of what there is, for ``reduced``."""
        there = {"ema": self.ema, "optimizer": self._optimizers, "scheduler": self._scheduler}
        return ("model", *(name for name, part in there.items() if part), *self._stateful, RNG)

    @property
    def shared_keys(self) -> tuple[str, ...]:
        """Top-level keys of plain values that must be the same on all ranks."""
        return ("lr_scheduler", *(name for name, thing in self._stateful.items() if not isinstance(thing, PerRank)))

    @property
    def growing_keys(self) -> tuple[str, ...]:
        """Those of ``shared_keys`` whose values may have other keys and shapes in mid-run than at the start."""
        modules = {key for key, thing in self._stateful.items() if isinstance(thing, nn.Module)}
        # The first one is the scheduler's.
        there = self.shared_keys if self._scheduler is not None else self.shared_keys[1:]
        return tuple(key for key in there if key not in modules)

    def replicated(self, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the tensors of a collected state of which several ranks may hold the same part, buffers left out.

        DDP lets buffers, such as the statistics of BatchNorm, go apart from one forward to the next.
        """
        buffers = self._buffers()
        tensors = tensors_of(state, without={RNG, "train_state", *self._stateful})
        return {name: tensor for name, tensor in tensors.items() if _of_module(name) not in buffers}

    def changed_by_steps(self) -> Callable[[KeyPath], bool]:
        """Return what tells of a path of the state whether only an optimizer's step, or the average after it, changes
        the tensor there.

        Buffers change in the forward, counters, schedules and options of groups when they like.
        """
        buffers = self._buffers()
        others = frozenset({RNG, "train_state", "lr_scheduler", "ema_state", *self._stateful})

        def is_changed(path: KeyPath) -> bool:
            name = ".".join(map(str, path))
            is_option = name.startswith("optimizer.param_groups.")
            return path[0] not in others and not is_option and _of_module(name) not in buffers

        return is_changed

    def _buffers(self) -> set[str]:
        return {clean_fqn(name, self._model) for name, _ in self._model.named_buffers()}

    def reduced(self, parts: Collection[str]) -> TrainState:
        """Return the same with some of its parts only."""
        return TrainState(
            self._model,
            optimizer=self._optimizers if "optimizer" in parts else None,
            scheduler=self._scheduler if "scheduler" in parts else None,
            ema=self.ema if "ema" in parts else None,
            stateful={name: thing for name, thing in self._stateful.items() if name in parts},
            nested=self._nested,
            rank=self._rank,
            world_size=self._size,
        )

    def collect(self, step: int, *, with_rng: bool = True, with_main: bool = True, to_load: bool = False) -> Contents:
        """Return the live state, not copied. All ranks; communicates only under FSDP1.

        Args:
            step: Number of the step.
            with_rng: Whether to take the random number generators, too.
            with_main: Whether to take the main weights, too.
            to_load: Whether it is to be filled, without what single ranks have for themselves (``read_rank_states``);
                otherwise it is only to be read.

        Raises:
            UsageError: the model's names cannot be told from the rest of the checkpoint; or, unless it is to be filled,
                parameters have no values yet, or a value could not be read again.
        """
        found = self._ask(to_load)
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
            # Under a key of their own the averages are found as a model by any reader.
            state["ema_model"] = state["ema_state"].pop("model")
        if with_rng:
            state[RNG] = {self._rng_key: rng_state()}
        state["train_state"] = {"step": torch.tensor(step, device="cpu")}
        for name, thing in self._stateful.items():
            if not isinstance(thing, PerRank):
                state[name] = thing.state_dict()
            elif not to_load:
                state[name] = thing.pack(name, self._rank, self._topology())
        if not to_load:
            state = self._as_saved(made_readable(state))
        facts = self.ema.facts() if self.ema is not None else None
        options = {} if to_load else self._options.now()
        return Contents(
            step=step,
            state_dict=state,
            ema=facts,
            tied=found.tied,
            mesh=mesh_of(main),
            options=options,
            settings=self._settings.of(self._model) if with_main and not to_load and self._rank == 0 else None,
        )

    def restore(self, state: Mapping[str, Any]) -> None:
        """Hand loaded state, in the form that ``collect`` gave, back to its owners. All ranks; communicates (FSDP1)."""
        aside = _OURS | self._stateful.keys()
        flat = {name: value for name, value in state.items() if name not in aside}
        main = state.get("model", {}) if self._nested else flat
        if main:
            write_model(self._model, main)
        if self._optimizers:
            with hybrid_groups_have_a_source(self._model), finding_parameters_fast(self._optimizers):
                set_optimizer_state_dict(self._model, self._optimizers, state["optimizer"], options=FLAT_OPTIMIZER)
        if self._scheduler is not None:
            self._scheduler.load_state_dict(state["lr_scheduler"])
        if self.ema is not None:
            self.ema.load_state_dict({**state["ema_state"], "model": state["ema_model"]})
        for name, thing in self._stateful.items():
            if not isinstance(thing, PerRank):
                thing.load_state_dict(state[name])
            # None: it is to begin anew, as on_topology_change="restart" says.
            elif self._rank_states.get(name) is not None:
                thing.load_state_dict(self._rank_states[name])
        # Last, as what is loaded before may draw numbers.
        if RNG in state:
            set_rng_state(state[RNG][self._rng_key])

    @contextmanager
    def replacements_told(self, state: Mapping[str, Any]) -> Iterator[None]:
        """Within it ``state`` is restored; what becomes of settings of this run is logged. No communication."""
        with replacements_told(self._optimizers, self._scheduler):
            yield
        if self._optimizers:
            names = {id(parameter): clean_fqn(name, self._model) for name, parameter in self._model.named_parameters()}
            tell_mixed(self._optimizers, names, state["optimizer"])

    def saved_states_made(self, saved: Collection[str]) -> AbstractContextManager[None]:
        """Within it ``collect`` and ``restore`` know a state of each parameter of which a checkpoint has one.

        ``saved`` are the keys of its tensors. No communication.
        """
        names = {name for key in saved if (name := parameter_of(key))} if self._optimizers else set()
        return saved_states_made(self._model, self._optimizers, names)

    def left_behind(self, state: Mapping[str, Any], tied: Mapping[str, str], saved: Collection[str]) -> LeftBehind:
        """Return what a checkpoint has, and this rank does not load, of the parts in a state that is to be filled.

        ``saved`` are the keys of its tensors. No communication.
        """
        held = {
            id(parameter) for one in self._optimizers for group in one.param_groups for parameter in group["params"]
        }
        names = {clean_fqn(name, self._model) for name, one in self._model.named_parameters() if id(one) in held}
        return LeftBehind.of(state, tied, saved, beside={*self._stateful}, nested=self._nested, held=names)

    def without_unused(self, state: dict[str, Any], checkpoint: Path) -> UnusedParameters:
        """Remove what a checkpoint need not have from a state that is to be filled. No communication."""
        return UnusedParameters.taken_out(state, checkpoint, self._model, self._optimizers)

    def read_rank_states(self, checkpoint: Path) -> None:
        """Read what this rank has for itself, for ``restore`` to hand back. Every rank; no communication.

        Raises:
            MismatchError: it is the state of other ranks, and nothing says what becomes of it.
        """
        there = {name: thing for name, thing in self._stateful.items() if isinstance(thing, PerRank)}
        if there:
            topology = self._topology()
            self._rank_states = {
                name: thing.choose(name, checkpoint, self._rank, topology) for name, thing in there.items()
            }

    def _as_saved(self, state: dict[str, Any]) -> dict[str, Any]:
        numbered: list[str] = []
        for key in self.growing_keys:
            state[key] = with_text_keys(state[key], key, numbered)
        if numbered:
            state["train_state"][INT_KEYS] = numbered
        return state

    def _ask(self, to_load: bool) -> StateDicts:
        try:
            return ask_torch(self._model, self._optimizers) if to_load else self._known.state_dicts()
        except KeyError:  # so torch says that it has no name for a parameter of the optimizer
            check_optimizers("the run's state", self._model, self._optimizers)
            raise

    def _topology(self) -> dict[str, Any]:
        mesh = mesh_of(dict(self._model.named_parameters()))
        return {"world_size": self._size, "mesh": "none" if mesh is None else f"{mesh['shape']} {mesh['dim_names']}"}

    def _flat(self, main: Mapping[str, Any]) -> dict[str, Any]:
        reserved = NOT_A_MODEL | self._stateful.keys()
        if taken := sorted(name for name in main if name.split(".", 1)[0] in reserved):
            raise UsageError(
                f"the model has tensors under names that a checkpoint uses for other things: {', '.join(taken)}. "
                'Nothing was written. Pass layout="nested", which keeps the model under a key of its own.'
            )
        return dict(main)


def _of_module(name: str) -> str:
    """What a module calls the tensor that has this name in the state."""
    return name.removeprefix("model.").removeprefix("ema_model.")


def optimizer_list(optimizer: Optimizer | Iterable[Optimizer] | None) -> list[Optimizer]:
    """Return all of the optimizers."""
    if optimizer is None:
        return []
    return [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)


def mesh_of(state: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return shape and dimension names of the first DTensor's mesh."""
    for value in state.values():
        if isinstance(value, DTensor):
            names = value.device_mesh.mesh_dim_names
            return {"shape": list(value.device_mesh.shape), "dim_names": list(names) if names else None}
    return None
