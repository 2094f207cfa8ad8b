"""The state of torchdata's StatefulDataLoader for another number of ranks, where the order of samples defines it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any


def reshard_loader(loader: Any, states: Sequence[Any], rank: int, world_size: int) -> Any | None:
    """Return the state with which this rank goes on where the ranks that saved were; None of any other object.

    A ``StatefulDistributedSampler`` deals the samples of an epoch in turn to the ranks, so after ``n`` samples on each
    of ``W`` ranks the first ``n * W`` are used up, and ``n * W / W'`` on each of ``W'`` ranks say the same.

    Args:
        loader: The data loader, or any other object.
        states: Of all ranks that saved, in their order.
        rank: This rank; the state is the same on all.
        world_size: Number of ranks now.

    Raises:
        ValueError: it is such a loader, but what was used up does not divide into whole batches of the ranks now, or
            the state holds more than the place in the samples.
    """
    del rank
    if not _is_distributed(loader):
        return None
    places = [_place(state) for state in states]
    if any(place != places[0] for place in places):
        raise ValueError("the ranks were at different places of their samples")
    samples, batch_size = places[0] * len(states), loader.batch_size
    # Only whole batches: where a rank was within a batch, no state says.
    if samples % (world_size * batch_size):
        raise ValueError(
            f"{samples} samples were used, which {world_size} ranks with batches of {batch_size} cannot share evenly"
        )
    # All were at the same place, so that the state of any rank will do.
    state = copy.deepcopy(states[0])
    _set_place(state, samples // world_size, samples // world_size // batch_size)
    return state


def _is_distributed(loader: Any) -> bool:
    names = [type(one).__module__ for one in (loader, getattr(loader, "sampler", None))]
    sampler = type(getattr(loader, "sampler", None)).__name__
    return all(name.startswith("torchdata.") for name in names) and sampler == "StatefulDistributedSampler"


def _main(state: Any) -> dict[str, Any]:
    """Where the place is kept: in the process itself, or in its snapshot of the workers."""
    snapshot = state.get("_snapshot")
    if snapshot is None:
        own = [state]
    else:
        # What the workers have given since is in no snapshot.
        if state["_steps_since_snapshot"]:
            raise ValueError("its workers were ahead of the last snapshot; pass snapshot_every_n_steps=1 to the loader")
        own = [*snapshot["_worker_snapshots"].values()]
        state = snapshot["_main_snapshot"]
    if any(one.get("dataset_state") is not None or one.get("fetcher_state") is not None for one in own):
        raise ValueError("its dataset has a state of its own")
    found: dict[str, Any] = state
    return found


def _place(state: Any) -> int:
    main = _main(state)
    if state["_iterator_finished"]:
        raise ValueError("it was at the end of an epoch")
    return int(main["_sampler_iter_state"]["samples_yielded"])


def _set_place(state: dict[str, Any], samples: int, batches: int) -> None:
    main = _main(state)
    main["_sampler_iter_state"] = {"samples_yielded": samples, "sampler_state": {"yielded": samples}}
    main["_sampler_iter_yielded"] = batches
    if "_snapshot" in state:
        state["_snapshot"]["_snapshot_step"] = batches
    else:
        state["_num_yielded"] = batches
