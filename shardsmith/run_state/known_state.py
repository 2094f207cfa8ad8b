"""Model and optimizer state as torch's functions give it, which take long at every call: found out once."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.optim import Optimizer

from shardsmith.live.recognition import Recognition, is_same_memory, own_tensors
from shardsmith.run_state.fsdp1_hybrid import hybrid_groups_have_a_source
from shardsmith.run_state.optimizers import optimizer_refused
from shardsmith.run_state.renamed_model import read_model
from shardsmith.tensors.fqn import clean_fqn, refuse_without_values, tied_weights

FLAT_OPTIMIZER = StateDictOptions(flatten_optimizer_state_dict=True)


@dataclass(frozen=True, slots=True)
class StateDicts:
    """The state of a model and its optimizers. Tensors share memory with the live ones."""

    model: dict[str, Any]
    optimizer: dict[str, Any]
    """Flattened: ``state.<fqn>.<name>`` and ``param_groups.<fqn>.<name>``. Empty without an optimizer."""
    tied: dict[str, str]
    """Alias -> kept FQN."""


class KnownState:
    """Asks torch again only when the model or the keys of the optimizers have changed since it was last asked.

    What is made up without torch was compared with torch's answer once: the same keys in the same order, the same
    memory, the same values. Where it differs (FSDP1, hooks that save other tensors), torch is asked every time.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Nothing is asked yet."""
        self._model = model
        self._optimizers = optimizers
        self._known: _Known | None = None

    def state_dicts(self) -> StateDicts:
        """Return the live state, to be read. All ranks; communicates only under FSDP1.

        Raises:
            UsageError: parameters have no values yet.
        """
        found = self._known.state_dicts(self._model, self._optimizers) if self._known else None
        if found is None:
            refuse_without_values(self._model)  # of a model that is what it was, all have values
            found = ask_torch(self._model, self._optimizers)
            self._known = _Known.of(self._model, self._optimizers, found)
        return found


def ask_torch(model: nn.Module, optimizers: Sequence[Optimizer]) -> StateDicts:
    """The state by torch's own functions, to be read or loaded into. All ranks; communicates only under FSDP1."""
    main = read_model(model)
    optimizer: Mapping[str, Any] = {}
    if optimizers:
        with hybrid_groups_have_a_source(model), _refused_by_torch(optimizers):
            optimizer = get_optimizer_state_dict(model, list(optimizers), options=FLAT_OPTIMIZER)
    return StateDicts(main, dict(optimizer), tied_weights(model))


@contextlib.contextmanager
def _refused_by_torch(optimizers: Sequence[Optimizer]) -> Iterator[None]:
    """For an optimizer of others that has no state by parameter, or does not bear the step that torch tries."""
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:
        raise optimizer_refused(optimizers, error) from error


@dataclass(frozen=True, slots=True)
class _Known:
    """How to make up the state without torch, as long as the model is what it was. Keeps no tensor alive."""

    recognition: Recognition
    tensors: dict[str, weakref.ref[Tensor]]
    """Of the model, by key."""
    optimizer_keys: list[str]
    layout: list[Any]
    """Of the optimizers, as ``_laid_out`` gives it."""
    order: list[int]
    """By key of the optimizers' state, the place of its value among those of ``_laid_out``."""
    tied: dict[str, str]

    @classmethod
    def of(cls, model: nn.Module, optimizers: Sequence[Optimizer], found: StateDicts) -> Self | None:
        """From torch's answer; None if the state cannot be made up without torch."""
        # What is no tensor, such as extra state, is made anew at each call.
        if not all(isinstance(value, Tensor) for value in found.model.values()):
            return None
        own = own_tensors(model, found.model)
        if own is None:
            return None
        names = {id(parameter): clean_fqn(name, model) for name, parameter in model.named_parameters()}
        places = {key: place for place, key in enumerate(_keys(optimizers, names))}
        if places.keys() != found.optimizer.keys():
            return None
        layout, order = _laid_out(optimizers)[0], [places[key] for key in found.optimizer]
        tensors = {key: weakref.ref(tensor) for key, tensor in own.items()}
        known = cls(Recognition(model), tensors, [*found.optimizer], layout, order, found.tied)
        again = known.state_dicts(model, optimizers)
        return known if again is not None and _are_same(again.optimizer, found.optimizer) else None

    def state_dicts(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> StateDicts | None:
        """Return the state as it is now; None if anything has changed but values."""
        if not self.recognition.fits(model):
            return None
        tensors = {name: tensor for name, reference in self.tensors.items() if (tensor := reference()) is not None}
        layout, values = _laid_out(optimizers)
        if layout != self.layout or len(tensors) != len(self.tensors):
            return None
        optimizer = dict(zip(self.optimizer_keys, map(values.__getitem__, self.order), strict=True))
        return StateDicts(tensors, optimizer, self.tied)


def _laid_out(optimizers: Sequence[Optimizer]) -> tuple[list[Any], list[Any]]:
    """What the keys of the optimizers' state follow from, by parameters and the names of their values; the values.

    It is made at every save, of tens of thousands of values: so names are not put together here.
    """
    layout, values = list[Any](), list[Any]()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            options = {option: value for option, value in group.items() if option != "params"}
            layout.append([*options])
            for parameter in group["params"]:
                state = optimizer.state.get(parameter, {})
                layout.append((id(parameter), *state))
                values.extend(state.values())
            values.extend([*options.values()] * len(group["params"]))
    return layout, values


def _keys(optimizers: Sequence[Optimizer], names: Mapping[int, str]) -> Iterator[str]:
    """Yield the key of each value of ``_laid_out``. ``names``: of the model's parameters, by ``id``."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            found = [(names.get(id(parameter)), optimizer.state.get(parameter, {})) for parameter in group["params"]]
            yield from (f"state.{name}.{key}" for name, state in found for key in state)
            options = [option for option in group if option != "params"]
            yield from (f"param_groups.{name}.{option}" for name, _ in found for option in options)


def _are_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether values are the same objects, the same memory or, of plain values, equal."""
    return one.keys() == other.keys() and all(_is_same(value, other[key]) for key, value in one.items())


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or is_same_memory(one, other)
    return type(one) is type(other) and not isinstance(one, Tensor) and bool(one == other)
