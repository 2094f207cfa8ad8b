"""Plan the modules of a sentence encoder: those of the checkpoint are written into the folders of the base model's."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from shardsmith.errors import MismatchError
from shardsmith.export.base_comparison import differences
from shardsmith.formats.models import ModelSource
from shardsmith.hf.directory import ModelPlan, plan_model
from shardsmith.hf.modules import Module, Modules
from shardsmith.tensors.dtypes import DtypeChoice, general_dtype
from shardsmith.tensors.tensors import TensorSpec
from shardsmith.tensors.wrappers import WRAPPERS_IN_FILES


class ModulePlans:
    """The modules that are written beside the models of one directory.

    Attributes:
        plans: One for each module of each model.
        sources: The tensors of each, by what the directory calls it.
        specs: The tensors of the base model's file, in the same way.
    """

    def __init__(self, base: Path, *, dtype: DtypeChoice, allow: Sequence[str], drop: Sequence[str]) -> None:
        """Read the base model's modules.

        Args:
            base: The base model's directory.
            dtype: Of floating-point tensors. Patterns are of the model's names; the library gives modules one dtype.
            allow: Patterns of tensors that may differ from the base model's, by their names in the whole encoder.
            drop: Patterns of tensors to leave out, in the same way.

        Raises:
            CheckpointError: the modules cannot be read.
        """
        self.plans: list[ModelPlan] = []
        self.sources: dict[str, ModelSource] = {}
        self.specs: dict[str, Mapping[str, TensorSpec]] = {}
        self._modules = Modules(base)
        self._dtype = general_dtype(dtype)
        self._allow = allow
        self._drop = drop
        self._written: list[Module] = []
        self._lacking: list[Module] = []

    def take(self, opened: ModelSource, model: str, stem: str, named: Collection[str]) -> tuple[ModelSource, list[str]]:
        """Plan the modules of a model. Return the rest of it, and what of the modules was left out by ``drop``.

        Args:
            opened: The model, without what was left out by its own names.
            model: What it is called ("main", "ema").
            stem: Of its weight files' names.
            named: What was left out by its own names.

        Raises:
            MismatchError: a module is not as in the base model, or a checkpoint of the whole encoder does not have it.
        """
        dropped: list[str] = []
        problems: dict[str, list[str]] = {}
        cures: list[str] = []
        rest = opened
        for module, held in self._modules.divide(opened.specs, absent=True):
            rest = rest.without(held.values())
            gone = [name for name in held if _like(module.in_whole(name), self._drop)]
            dropped += map(module.in_whole, gone)
            part = opened.only({name: own for name, own in held.items() if name not in gone})
            if not part.specs and (gone or _has_some(module, named)):
                continue  # left out as asked for: the base model's own is copied
            plan = self._plan(part, module, model, stem)
            if lines := differences(plan, module.specs, self._allow, module.in_whole("")):
                problems[module.folder] = lines
                cures.append(_cure(module, is_absent=not held))
            elif not part.specs:
                self._lacking.append(module)
            else:
                self._written.append(module)
                self.plans.append(plan)
                self.sources[plan.model], self.specs[plan.model] = part, module.specs
        if problems:
            lines = [line for lines in problems.values() for line in lines]
            summary = f"{len(lines)} tensors of {', '.join(problems)} are not as in the base model"
            raise MismatchError(opened.path, summary, lines, "\n".join(["Nothing was written.", *cures]))
        return rest, dropped

    def are_written(self, file: str) -> bool:
        """Return whether a file of the base model holds weights of a module that is written: they would be old ones."""
        return any(module.has_weights(file) for module in self._written)

    def lack(self, file: str) -> bool:
        """Return whether a file of the base model holds a module that the checkpoint does not have, as was allowed."""
        return any(module.has_weights(file) for module in self._lacking)

    def _plan(self, part: ModelSource, module: Module, model: str, stem: str) -> ModelPlan:
        return plan_model(
            module.called(model),
            list(part.specs.values()),
            stem=f"{module.folder}/{stem}",
            dtype=self._dtype,
            max_shard_size=None,
            aliases={},
        )


def _cure(module: Module, *, is_absent: bool) -> str:
    pattern = module.in_whole("*")
    if is_absent:
        return (
            f"The checkpoint has the names of the whole encoder, and nothing of {module.folder}. To copy that of the "
            f"base model, which was not trained with this transformer: --allow '{pattern}'"
        )
    return (
        f"Give a base model with the {module.folder} of the checkpoint. With --drop '{pattern}' that of the base model "
        "is copied, which is not the trained one."
    )


def _has_some(module: Module, names: Collection[str]) -> bool:
    """Whether one of the names, whatever it begins with, is that of a tensor of the module."""
    ends = tuple(f".{module.in_whole(name)}" for name in module.specs)
    plain = (".".join(part for part in name.split(".") if part not in WRAPPERS_IN_FILES) for name in names)
    return any(f".{name}".endswith(ends) for name in plain)


def _like(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
