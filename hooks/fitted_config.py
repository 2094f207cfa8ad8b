"""The config of a run's directories: read once, then fitted to the tensors that are exported under it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from shardsmith.errors import MismatchError
from shardsmith.export.base_comparison import advice_of_hooks, fit, measure_of
from shardsmith.export.live import LiveModel
from shardsmith.formats.models import ModelSource, TranslatedModel
from shardsmith.hf.base_files import choose_files
from shardsmith.hf.blueprint import transformers_parts
from shardsmith.hf.directory import Measure, ModelPlan
from shardsmith.hf.hf_directory import read_config
from shardsmith.hf.known_class import model_class_of
from shardsmith.hf.live_config import full_config, saved_config
from shardsmith.hf.model_class import ModelClass
from shardsmith.hf.model_code import refuse_missing_code
from shardsmith.hf.modules import Modules
from shardsmith.hf.template import BaseTemplate, read_template
from shardsmith.hf.ties import broken_ties, own_places, tied_groups
from shardsmith.tensors.fqn import non_persistent_buffers, own_class
from shardsmith.tensors.tensors import TensorSpec

from .live_directory import ModelFiles

log = logging.getLogger(__name__)


class FittedConfig:
    """What is written as config.json, and what the tensors are compared with: the base model and the config's class.

    Attributes:
        content: What is written, None for a model without a config.
        template: What the base model's files hold; empty without one.
        measure: What the tensors were last compared with.
        copies: Files of the base model that are copied.
        transient: Names of the model's buffers that no state dict holds.
    """

    def __init__(self, model: nn.Module, inner: nn.Module | None, files: ModelFiles) -> None:
        """Nothing is read yet.

        Args:
            model: The module that trains.
            inner: The model in it that a library saves, if there is one.
            files: What lies beside the weights.
        """
        self._model, self._inner, self._files = model, inner, files
        self.content: dict[str, Any] | None = None
        self.template, self.measure = BaseTemplate(Path(), None, {}, ""), Measure()
        self.copies: tuple[str, ...] = ()
        # a base model of an older transformers has some of them in its files: position_ids, for one
        self.transient = () if inner is None else tuple(non_persistent_buffers(inner))
        self._own: dict[str, Any] | None = None  # before it is adapted to tensors
        self._described: Any = None  # what it was last fitted to
        self._said: set[str] = set()

    @property
    def model_class(self) -> ModelClass | None:
        """The class that the config names, as far as it is known, before it is fitted. After ``read``."""
        return None if self._own is None else model_class_of(self._own)[0]

    def own_places(self, aliases: Mapping[str, str]) -> dict[str, str]:
        """As ``own_places`` of ``hf/ties.py``, for the model that trains. After ``read``."""
        if not aliases:  # as of most models; making a class takes a moment
            return {}
        model_class = model_class_of(full_config(self._inner))[0] or self.model_class
        return own_places(aliases, model_class, self.template.specs)

    def read(self, specs: Mapping[str, TensorSpec]) -> None:
        """Read config and base model. On every rank; no communication.

        Args:
            specs: Of the parameters, by their names in the files. Not needed without a base model.

        Raises:
            CheckpointError: a file of the base model cannot be read.
        """
        base = self._files.base
        self.content = self._own = saved_config(self._inner) if base is None else read_config(base)
        if base is not None:
            self.template = read_template(base)
            files = choose_files(
                base, {**specs, **self.template.specs}, trust_remote_code=self._files.trust_remote_code
            )
            self.copies = tuple(name for name in files.copies if not self._files.replaced(name))
            files.log_what_is_unexpected(log)

    def follow(self, models: Sequence[LiveModel]) -> None:
        """Fit the config again if tensors, ties or the live model's config are not as they were. No communication.

        On the rank that writes the config.

        Raises:
            MismatchError: names or shapes are no longer those of the base model's weights, and no config has them.
        """
        plan = models[0].plan
        # Without dtypes: an average may have others than the main weights, under the same names.
        shapes = [(spec.name, spec.shape) for spec in plan.specs]
        config = full_config(self._inner)
        now = shapes, dict(plan.aliases), config
        if now != self._described:
            if self._files.base is None:
                self._own = saved_config(self._inner)
            self._compare(plan, config)
            self._described = now
            if plan.float32_unknown:
                log.warning("%s", plan.float32_unknown)

    def fit(
        self, path: Path, plan: ModelPlan, live: Mapping[str, Any], source: ModelSource | TranslatedModel | None
    ) -> None:
        """Adapt the config to the tensors, and compare them with the base model and with the class that it names.

        Args:
            path: Where the tensors are from, for the errors.
            plan: The planned tensors of one model.
            live: What the config of the live model says, with every default.
            source: Of the tensors, where they are in a checkpoint; None for live weights, where what is tied is one
                tensor in memory.

        Raises:
            MismatchError: as ``fit``.
        """
        if (config := self._own) is None:
            return
        model_class, separate = model_class_of(config)[0], dict[str, str]()
        if model_class is not None:
            names = {spec.name for spec in plan.specs}
            groups = tied_groups(model_class.tied, names)
            separate = {alias: kept for kept, *aliases in groups for alias in aliases}
            if source is not None and separate:
                separate = {a: k for a, k in broken_ties(source, model_class).items() if {a, k} <= names}
        found = fit(path, plan, config, self.template, separate, self.transient, live)
        refuse_missing_code(path, found, {*self.copies, *self._files.extra, *self._files.code(self._inner)})
        self.content, self.measure = found.config, measure_of(found, self.template)
        for change in [change for change in found.changes if change not in self._said]:
            self._said.add(change)
            log.info("config.json is adapted: %s", change)

    def _compare(self, plan: ModelPlan, live: Mapping[str, Any]) -> None:
        """As ``fit``, of the live weights; what is wrong is said of the model that trains."""
        place = self._files.base or Path(own_class(self._inner or self._model).__name__)
        try:
            self.fit(place, plan, live, None)
        except MismatchError as error:
            summary = f"{len(error.problems)} tensors of the model that trains are not as in the base model"
            advice = self._advice_of_modules(plan) or self._advice_of_a_part(plan) or advice_of_hooks(error, "STEP")
            raise MismatchError(place, summary, error.problems, advice) from None

    def _advice_of_modules(self, plan: ModelPlan) -> str:
        """What to do about a model of sentence-transformers whose modules have weights; empty for any other model."""
        base = self._files.base
        held = Modules(base).divide([spec.name for spec in plan.specs]) if base is not None else []
        if not held:
            return ""
        return (
            f"Nothing was written. The model has weights of {', '.join(module.folder for module, _ in held)}, which "
            "HFExport does not write. Leave it out and export saved steps, with all modules:\n"
            f"shardsmith to-hf --checkpoint STEP --base-model {base} --output-dir DIRECTORY"
        )

    def _advice_of_a_part(self, plan: ModelPlan) -> str:
        """What to do if a part of the live model, beside which it has other tensors, is of the base model's kind."""
        parts = transformers_parts(self._model)
        kind = (self._own or {}).get("model_type")
        alike = [name for name, part in parts.items() if name and part.config.model_type == kind]
        if not alike or all(spec.name.startswith(tuple(f"{name}." for name in parts)) for spec in plan.specs):
            return ""
        return (
            "Nothing was written. The base model is that of a part of this model, which has other tensors beside it. "
            f"Give HFExport the part alone: {' or '.join(f'model=MODEL.{name}' for name in alike)}"
        )
