"""Whether optimizers hold the parameters of a model, and no others."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from shardsmith.errors import UsageError
from shardsmith.tensors.fqn import clean_fqn

log = logging.getLogger(__name__)


def check_optimizers(
    owner: str, model: nn.Module, optimizers: Sequence[Optimizer], scheduler: object | None = None
) -> None:
    """Raise UsageError unless every parameter of the optimizers is one of the model's. No communication.

    Nor may the schedule be that of another optimizer: it would go on without the learning rate that trains.

    An optimizer that was made before the model was sharded holds parameters that nobody trains any more: its steps
    change nothing, and a save finds no names for them. Parameters that no optimizer holds are named in a warning. An
    optimizer of torch whose state torch cannot give by parameter is refused, too.
    """
    for optimizer in optimizers:
        _check_kind(optimizer)
    # By identity: after sharding, other parameters have the same names.
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    held = [(one, parameter) for one in optimizers for group in one.param_groups for parameter in group["params"]]
    foreign = [(one, parameter) for one, parameter in held if id(parameter) not in names]
    problems = []
    for optimizer in dict.fromkeys(one for one, _ in foreign):
        shapes = [tuple(parameter.shape) for one, parameter in foreign if one is optimizer]
        total = sum(one is optimizer for one, _ in held)
        problems.append(
            f"{len(shapes)} of the {total} parameters of {type(optimizer).__name__} are not in the model; "
            f"the first has shape {shapes[0]}"
        )
    counts = Counter(id(parameter) for _, parameter in held)
    problems += [f"{names[key]} is in {n} optimizers" for key, n in counts.items() if n > 1 and key in names]
    if problems:
        lines = "\n  ".join(problems)
        raise UsageError(
            f"{owner}: the optimizer does not hold the parameters of the model\n  {lines}\n"
            f"{_advice(model, [tuple(parameter.shape) for _, parameter in foreign])}Nothing was done."
        )
    if optimizers:
        _check_scheduler(owner, optimizers, scheduler)
        _warn_of_missing(owner, model, {id(parameter) for _, parameter in held})


class GroupOptions:
    """The options of each group of parameters, such as ``lr``, by the FQN of its first parameter. No communication.

    Ranks that have the same group must have the same options for it.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        self._model = model
        self._optimizers = optimizers
        self._named: dict[int, tuple[Tensor, str]] = {}  # looked up once: a model may have 100,000 parameters

    def now(self) -> dict[str, dict[str, Any]]:
        """Return them as they are now."""
        groups = [group for one in self._optimizers for group in one.param_groups if group["params"]]
        first = {id(group["params"][0]): group for group in groups}
        # Python uses an id again for another object, so the parameter itself is compared.
        if any(key not in self._named or self._named[key][0] is not group["params"][0] for key, group in first.items()):
            named = self._model.named_parameters()
            self._named = {id(p): (p, clean_fqn(name, self._model)) for name, p in named if id(p) in first}
        return {
            self._named[key][1]: {option: value for option, value in group.items() if option != "params"}
            for key, group in first.items()
            if key in self._named
        }


def optimizer_refused(optimizers: Sequence[Optimizer], error: Exception) -> UsageError:
    """What to do about optimizers that torch's state-dict functions do not take."""
    kinds = ", ".join(sorted({type(one).__name__ for one in optimizers}))
    return UsageError(
        f"torch cannot give the state of the optimizer ({kinds}) by the names of parameters: {error}\n"
        "If no parameter is sharded, leave it out of optimizer= and pass stateful={'own_optimizer': optimizer}, "
        "which saves and loads the state as the optimizer gives it"
    )


@contextlib.contextmanager
def finding_parameters_fast(optimizers: Sequence[Optimizer]) -> Iterator[None]:
    """Keep ``load_state_dict`` from a search of all parameters for each of them, as torch's own does.

    With 45,000 parameters that search takes minutes. Hooks of users are called before this one.
    """
    handles = [one.register_load_state_dict_pre_hook(_with_searchable_groups) for one in optimizers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _with_searchable_groups(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG001
    groups = [{**group, "params": _Searchable(group["params"])} for group in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups}


class _Searchable(list[Any]):
    """A list that is asked again and again whether something is in it, and does not change."""

    def __init__(self, items: Iterable[Any]) -> None:
        super().__init__(items)
        self._items = frozenset(self)

    def __contains__(self, item: object) -> bool:
        return item in self._items


def _check_kind(optimizer: Optimizer) -> None:
    """Do what torch does before it loads a state: a step on zeros. Of classes of others it is not known how to try."""
    if not type(optimizer).__module__.startswith("torch.optim."):
        return
    # Two dimensions, as some optimizers take matrices only.
    parameter = nn.Parameter(torch.zeros(2, 2, device="cpu"))
    parameter.grad = torch.zeros(2, 2, device="cpu")
    kind: Any = type(optimizer)  # each has its own defaults
    try:
        kind([parameter]).step(closure=None)
    except (TypeError, RuntimeError) as error:  # LBFGS wants the loss again, SparseAdam gradients of its own kind
        raise optimizer_refused([optimizer], error) from error


def _check_scheduler(owner: str, optimizers: Sequence[Optimizer], scheduler: object) -> None:
    """By the groups, which an optimizer that wraps another one shares with it."""
    groups = {id(group) for one in optimizers for group in one.param_groups}
    scheduled = getattr(getattr(scheduler, "optimizer", None), "param_groups", [])
    if scheduled and not any(id(group) in groups for group in scheduled):
        raise UsageError(
            f"{owner}: {type(scheduler).__name__} sets the learning rate of an optimizer that is not the one given: "
            f"make it with {type(scheduler).__name__}(optimizer, ...). Nothing was done."
        )


def _advice(model: nn.Module, shapes: Sequence[tuple[int, ...]]) -> str:
    if not shapes:
        return ""
    if set(shapes) <= {tuple(parameter.shape) for parameter in model.parameters()}:
        return (
            "They have the shapes of the model's own: the optimizer was made before the model was sharded, or for "
            "another model. Make it after fully_shard / FSDP, from model.parameters().\n"
        )
    return "Give the optimizer parameters of this model only, or make the other module a part of the model.\n"


def _warn_of_missing(owner: str, model: nn.Module, held: set[int]) -> None:
    missing = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        log.warning("%s: %s: trainable, but in no optimizer; they are saved as they are", owner, shown)
