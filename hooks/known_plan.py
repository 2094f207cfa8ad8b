"""A plan of live weights is reused while the model and its average consist of the same tensors."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor, nn

from shardsmith.export.live import LiveModel
from shardsmith.hf.directory import ModelPlan
from shardsmith.live.recognition import Recognition
from shardsmith.name_maps.maps import Translation


@dataclass(frozen=True, slots=True)
class KnownPlan:
    """The plan of one directory, for as long as model and average consist of the same tensors. Keeps no tensor alive.

    Attributes:
        recognition: Of the model.
        average: The tensors of the average, by name.
        found: For each model of the directory its plan, its tensors, and their names in the files.
    """

    recognition: Recognition
    average: dict[str, weakref.ref[Tensor]]
    found: list[tuple[ModelPlan, dict[str, weakref.ref[Tensor]], Translation | None]]

    @classmethod
    def of(cls, model: nn.Module, models: Sequence[LiveModel], average: Mapping[str, Tensor]) -> Self:
        """Remember a plan, until the tensors that it is of are gone or others."""
        found = [(one.plan, _weakly(one.tensors), one.translation) for one in models]
        return cls(Recognition(model), _weakly(average), found)

    def models(self, model: nn.Module, average: Mapping[str, Tensor]) -> list[LiveModel] | None:
        """Return the plan again with its tensors; None if model or average have changed."""
        # By identity: another tensor may have the same name and shape.
        same_average = average.keys() == self.average.keys() and all(
            self.average[name]() is tensor for name, tensor in average.items()
        )
        if not same_average or not self.recognition.fits(model):
            return None
        models = []
        for plan, references, translation in self.found:
            tensors = {name: tensor for name, reference in references.items() if (tensor := reference()) is not None}
            models.append(LiveModel(plan, tensors, translation))
        return models


def _weakly(tensors: Mapping[str, Tensor]) -> dict[str, weakref.ref[Tensor]]:
    return {name: weakref.ref(tensor) for name, tensor in tensors.items()}
