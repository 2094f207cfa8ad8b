"""Whether a run can go on from a step, said in TorchTitan's own options before it loads anything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from shardsmith.errors import MismatchError
from shardsmith.formats.dcp.beside_weights import index_of

_LEAVE_OUT = "--checkpoint.exclude_from_loading="


def refuse_unlike(state_dict: Mapping[str, Any], checkpoint: Path) -> None:
    """Raise MismatchError unless a step has what this run needs: each part, this optimizer, as many data loaders.

    Reads the index; no communication but what the state dict of the optimizer needs.
    """
    index = index_of(checkpoint)
    stored = {*index.tensors, *index.objects}
    _refuse_absent(state_dict, {key.split(".", 1)[0] for key in stored}, checkpoint)
    _refuse_other_optimizer(state_dict.get("optimizer"), stored, checkpoint)
    _refuse_other_loaders(state_dict.get("dataloader"), stored, checkpoint)


def _refuse_absent(state_dict: Mapping[str, Any], stored: Iterable[str], checkpoint: Path) -> None:
    absent = [key for key, value in state_dict.items() if not isinstance(value, Tensor) and key not in stored]
    if absent:
        raise MismatchError(
            checkpoint,
            "a run cannot go on from this step",
            [f"{key}: not in it" for key in absent],
            "Nothing was loaded. A last step has weights only unless checkpoint.last_save_model_only is off. Go on "
            "from an earlier one with checkpoint.load_step, or start a new run from this one with initial_load_path. "
            f"To go on from this step and let these begin anew: {_LEAVE_OUT}{','.join(absent)}.",
        )


def _refuse_other_optimizer(optimizer: Any, stored: Iterable[str], checkpoint: Path) -> None:
    """The state of parameters has entries such as exp_avg. A rank may have a stage without those of other stages."""
    if optimizer is None:
        return
    saved = _entries(key.removeprefix("optimizer.") for key in stored if key.startswith("optimizer."))
    wanted = _entries(optimizer.state_dict())
    # A state that is there and that this optimizer has no use for is of another optimizer, too.
    if not wanted <= saved or (saved and not wanted):
        raise MismatchError(
            checkpoint,
            "this run's optimizer is not the one that was saved",
            [f"in the step: {_listed(saved)}", f"in this run: {_listed(wanted)}"],
            "Nothing was loaded. Set the optimizer that saved it (optimizer.name and its options), or go on with the "
            f"weights and a new optimizer: {_LEAVE_OUT}optimizer,lr_scheduler.",
        )


def _entries(keys: Iterable[str]) -> set[str]:
    """Names of what an optimizer keeps of each parameter, from keys such as ``state.norm.weight.exp_avg``."""
    return {key.rpartition(".")[2] for key in keys if key.startswith("state.")}


def _listed(entries: set[str]) -> str:
    return ", ".join(sorted(entries)) or "nothing of any parameter"


def _refuse_other_loaders(loader: Any, stored: Iterable[str], checkpoint: Path) -> None:
    """TorchTitan's data loaders cannot be divided among another number of ranks."""
    now = loader.state_dict().get("world_size") if loader is not None else None
    # TorchTitan saves one entry for each data-parallel rank.
    saved = sum(key.startswith("dataloader.dp_rank_") for key in stored)
    if now is not None and saved and saved != now:
        raise MismatchError(
            checkpoint,
            "the data loaders are those of another number of ranks",
            [f"dataloader: saved by {saved} data-parallel ranks, this run has {now}"],
            "Nothing was loaded. Go on with as many data-parallel ranks (parallelism.data_parallel_replicate_degree "
            f"times data_parallel_shard_degree), or begin the data anew: {_LEAVE_OUT}dataloader.",
        )
