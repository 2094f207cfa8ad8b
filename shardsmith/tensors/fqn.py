"""The names of a model's tensors as they belong in a file: without wrappers, and one for each tensor.

FSDP1, DDP, torch.compile and activation checkpointing put a segment of their own into the names of what they wrap;
FSDP2 does not. ``torch.distributed.checkpoint.state_dict.get_model_state_dict`` leaves the same segments out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from shardsmith.errors import UsageError
from shardsmith.tensors.wrappers import DDP, WRAPPERS


def clean_fqn(name: str, model: nn.Module | None = None) -> str:
    """Return the name without the segments that wrappers put into it. A clean name stays as it is.

    Args:
        name: FQN as ``named_parameters`` gives it.
        model: The module that ``name`` starts from. A ``module`` segment goes only where this shows it to be that of
            a DistributedDataParallel: many models have a ``module`` of their own.
    """
    kept: list[str] = []
    here: object = model
    for segment in name.split("."):
        of_ddp = segment == DDP and isinstance(here, DistributedDataParallel)
        if not of_ddp and segment not in WRAPPERS:
            kept.append(segment)
        # Followed through the model: only the module itself shows whether its "module" is that of DDP.
        here = getattr(here, segment, None)
    return ".".join(kept)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model itself, without DDP, FSDP1 and torch.compile around it. FSDP2 changes the model in place."""
    while isinstance(model, DistributedDataParallel | FullyShardedDataParallel | OptimizedModule):
        model = model._orig_mod if isinstance(model, OptimizedModule) else model.module
    return model


def inside_fabric(model: nn.Module) -> nn.Module:
    """What the wrapper of Lightning's Fabric runs, or the model itself. The wrapper has it twice, under two names."""
    held = model._modules.get("_forward_module")
    return model if held is None or "_original_module" not in model._modules else held


def own_class(model: nn.Module) -> type[nn.Module]:
    """The class that a model was made as. FSDP2 and ``replicate`` put one in its place that they derive from it."""
    return next(kind for kind in type(model).__mro__ if not kind.__module__.startswith("torch.distributed."))


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Return whether a name is like any of the patterns, as those of a shell."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def refuse_without_values(model: nn.Module) -> None:
    """Raise UsageError, naming one, if parameters have no values yet: on the meta device, or lazy."""
    empty = [name for name, parameter in model.named_parameters() if is_lazy(parameter) or parameter.is_meta]
    if empty:
        raise UsageError(
            f"{len(empty)} parameters of {type(model).__name__} have no values yet, such as "
            f"{clean_fqn(empty[0], model)}: they are on the meta device, or lazy. Materialize the model first, "
            "with to_empty(device=...) and its weights, or a forward of a lazy one"
        )


def tied_weights(model: nn.Module) -> dict[str, str]:
    """Alias -> the name kept for it, for parameters and persistent buffers that are one tensor under several names.

    Of several names the first in the model is kept, or, where the model or a part of it is from transformers, the
    one that ``save_pretrained`` writes. Names are clean. Ties that a wrapper has broken are no ties any more.
    """
    names_of: dict[int, dict[str, None]] = {}
    for name, tensor in _saved_tensors(model):
        # By identity: tied tensors are one object. The dict keeps the model's order of the names.
        names_of.setdefault(id(tensor), {})[clean_fqn(name, model)] = None
    declared = _declared_aliases(model)
    kept: dict[str, str] = {}
    for names in map(list, names_of.values()):
        if len(names) > 1:
            kept |= _choose(names, declared)
    return kept


def non_persistent_buffers(model: nn.Module) -> list[str]:
    """Clean names of the buffers that no state dict holds, such as a rotary embedding's ``inv_freq``."""
    names: dict[str, None] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, buffer in module._buffers.items():
            if buffer is not None and name in module._non_persistent_buffers_set:
                names[clean_fqn(f"{prefix}.{name}" if prefix else name, model)] = None
    return list(names)


def _saved_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, then persistent buffers, under every name that they have."""
    # torch leaves out every name of a tensor but the first unless it is told not to.
    yield from model.named_parameters(remove_duplicate=False)
    transient = set(non_persistent_buffers(model))
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if clean_fqn(name, model) not in transient:
            yield name, buffer


def _declared_aliases(model: nn.Module) -> list[re.Pattern[str]]:
    """What transformers models say about their ties: patterns of the names to leave out of a file.

    As ``_get_tied_weight_keys`` of transformers.modeling_utils reads them: the keys of ``_tied_weights_keys`` (a
    mapping alias -> kept in transformers 5, a list of aliases before), below the name of the submodule that has them.
    """
    patterns = []
    for prefix, module in model.named_modules():
        path = clean_fqn(prefix, model)
        for pattern in getattr(module, "_tied_weights_keys", None) or ():
            patterns.append(re.compile(f"{path}.{pattern}" if path else pattern))
    return patterns


def _choose(names: list[str], declared: list[re.Pattern[str]]) -> dict[str, str]:
    """Alias -> kept among the names of one tensor, as ``remove_tied_weights_from_state_dict`` of transformers does.

    There, what matches a declaration is left out, in sorted order, except for the last if all of them match.
    """
    # At least one name must stay, so at most len(names) - 1 are dropped.
    matching = sorted(name for name in names if any(pattern.search(name) for pattern in declared))
    dropped = set(matching[: len(names) - 1])
    kept = next(name for name in names if name not in dropped)
    return {name: kept for name in names if name != kept}
