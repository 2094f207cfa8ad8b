"""What live, sharded weights are exported as, and which rank writes which box of them; agreed once for all exports."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import xxhash
from torch import Tensor

from shardsmith.export.live_share import OwnBoxes, deal_boxes, refuse_differences
from shardsmith.ground.ranks import Ranks
from shardsmith.hf.directory import ModelPlan
from shardsmith.name_maps.maps import Translation
from shardsmith.sharding.live_boxes import LiveBox, held_boxes
from shardsmith.tensors.tensors import Shape


@dataclass(frozen=True, slots=True)
class LiveModel:
    """One model on its way out: ``plan`` says what its files hold, ``tensors`` are the live ones."""

    plan: ModelPlan
    tensors: Mapping[str, Tensor]
    translation: Translation | None = None
    """From the tensors to what the files hold; None where they have the same names."""

    def boxes(self) -> list[LiveBox]:
        """Return all that this rank holds, in the names of the files. No communication; shares memory."""
        held = held_boxes(self.tensors)
        if self.translation is None:
            return held
        shapes = self.translation.shapes
        return [
            LiveBox(name, shapes[name], part, values)
            for box in held
            for name, part, values in self.translation.to_targets(box.name, box.box, box.values)
        ]

    def shapes(self) -> dict[str, Shape]:
        """In which shape the boxes of each tensor of the files are."""
        own = {spec.name: spec.shape for spec in self.plan.specs}
        if self.translation is None:
            return own
        shapes = self.translation.shapes
        return {name: shapes[name] for name in own}


@dataclass(frozen=True, slots=True)
class _Share:
    """What this rank writes of each model, and what the ranks held when that was agreed."""

    plans: list[ModelPlan]
    """Whoever gives the same objects again says that its ranks hold the same as before."""
    signature: str
    global_signature: str
    mine: dict[str, list[int]]
    """By model, positions in its boxes."""


class LiveExporter:
    """Exports one run's models again and again. Make it on every rank at the same point.

    It keeps what does not change: who writes what. A staging buffer belongs to one export from ``stage`` to the end of
    ``write``.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._shares: dict[str, _Share] = {}

    def begin(
        self, phase: str, kind: str, collect: Callable[[], Sequence[LiveModel]]
    ) -> tuple[list[ModelPlan], dict[str, list[LiveBox]]]:
        """Plans of the models, and by model the live boxes that this rank is to write. Main thread, all ranks.

        Communicates through the store.

        Args:
            phase: The moment, for the errors.
            kind: Exports of one kind hold the same; what was agreed for the one before is used again.
            collect: The models, as they are now.

        Raises:
            RankFailedError: on all ranks, if ``collect`` raised on any, or they do not hold whole tensors together.
        """
        models: list[LiveModel] = []
        held: dict[str, list[LiveBox]] = {}

        def look() -> tuple[bool, str]:
            models.extend(collect())
            held.update({model.plan.model: model.boxes() for model in models})
            share = self._shares.get(kind)
            # The same plan objects mean that nothing has changed: the boxes need not be described again.
            if share is not None and _are_same(share.plans, models):
                return True, share.global_signature
            return share is not None and share.signature == _signature(models, held), _global_signature(models)

        are_known = self._ranks.agree(phase, look, _all_know)
        # None: the ranks would write different files. A second exchange names what differs; it may be long.
        if are_known is None:
            self._ranks.agree(phase, lambda: _described(models), refuse_differences, large=True)
        if not are_known:
            # All ranks come here or none: ``_settle`` is an exchange of its own for each model.
            mine = {model.plan.model: self._settle(phase, model, held[model.plan.model]) for model in models}
            plans = [model.plan for model in models]
            self._shares[kind] = _Share(plans, _signature(models, held), _global_signature(models), mine)
        mine = self._shares[kind].mine
        # As they are now: the same positions, other tensors.
        return [model.plan for model in models], {name: [boxes[i] for i in mine[name]] for name, boxes in held.items()}

    def _settle(self, phase: str, model: LiveModel, held: Sequence[LiveBox]) -> list[int]:
        """Let rank 0 deal out the boxes of one model; the positions of those that this rank is to write."""
        own = OwnBoxes(model.shapes(), held)
        itemsizes = {spec.name: spec.dtype.itemsize for spec in model.plan.specs}
        answer = self._ranks.deal(
            phase, lambda: own.said, lambda reports: deal_boxes(model.shapes(), itemsizes, reports), large=True
        )
        return own.chosen(answer)


def _are_same(plans: Sequence[ModelPlan], models: Sequence[LiveModel]) -> bool:
    return len(plans) == len(models) and all(plan is model.plan for plan, model in zip(plans, models, strict=True))


def _signature(models: Sequence[LiveModel], held: Mapping[str, Sequence[LiveBox]]) -> str:
    """Of what this rank holds: as long as it stays the same, so does the dealing out."""
    boxes = [(name, [(box.name, box.box) for box in found]) for name, found in held.items()]
    return xxhash.xxh3_128_hexdigest(repr((_global_signature(models), boxes)).encode())


def _global_signature(models: Sequence[LiveModel]) -> str:
    """Of what all ranks together are about to write; the same on each."""
    specs = [(model.plan.model, [file.name for file in model.plan.weights.files], model.plan.specs) for model in models]
    return xxhash.xxh3_128_hexdigest(repr(specs).encode())


def _all_know(votes: Sequence[tuple[bool, str]]) -> bool | None:
    """Whether every rank knows its share; None if they are about to write different things."""
    return all(known for known, _ in votes) if len({signature for _, signature in votes}) == 1 else None


def _described(models: Sequence[LiveModel]) -> list[list[str]]:
    """What all ranks together are about to write, in its order: names, and what of each is the same on all ranks."""
    plans = [model.plan for model in models]
    tensors = [[f"{plan.model} {spec.name}", f"{spec.shape} {spec.dtype}"] for plan in plans for spec in plan.specs]
    return [*tensors, *([f"{plan.model} {file.name}", "a file"] for plan in plans for file in plan.weights.files)]
