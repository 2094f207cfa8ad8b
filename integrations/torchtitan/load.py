"""What is looked at before and after TorchTitan loads a checkpoint, and said if it is wrong.

TorchTitan takes silently: an existing folder without a checkpoint in it, which turns ``initial_load_path`` off (0.2); a
step in that folder, which outranks it; weights that its adapter has no name for, and that keep their random values.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint._nested_dict import flatten_state_dict

from shardsmith.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    InitialLoadError,
    MismatchError,
    RankFailedError,
    UsageError,
)
from shardsmith.formats.dcp.beside_weights import index_of
from shardsmith.formats.dcp.load import compare
from shardsmith.ground.layout import METADATA_FILE, step_name
from shardsmith.ground.ranks import Ranks
from shardsmith.hooks.stages import names_on_all
from shardsmith.load.buffer_reference import Fresh
from shardsmith.load.live_weights import LiveWeights
from shardsmith.load.load import poison_weights, verify_buffers, verify_loaded, verify_names
from shardsmith.manifest.checkpoints import committed_steps, find_damage
from shardsmith.manifest.metadata import CheckpointMetadata, read_metadata
from shardsmith.run_state.verification import verify_state
from shardsmith.tensors.fqn import clean_fqn, matches, own_class

from .inner import find_held, held_alone, recorded_config
from .names import RunNames
from .options import CheckpointHooks
from .resumable import refuse_unlike
from .rope import Reference
from .settings import Source, faults_on_all, find_source, quoted
from .steps import DamagedStepError, only_recorded

log = logging.getLogger(__name__)


class Form(Enum):
    """What a checkpoint is, in the words of TorchTitan's settings."""

    DCP = "a directory of torch.distributed.checkpoint"
    HF = "initial_load_in_hf"
    QUANTIZED = "initial_load_in_hf_quantized"


class LoadWatch:
    """The loads of one run. Make it on all ranks at the same point."""

    def resumes(self, checkpoint: Path) -> bool:
        """Return whether this is a step of the run itself that it goes on from."""
        return not self._is_initial(checkpoint)

    def __init__(
        self,
        config: Any,
        model_parts: Sequence[nn.Module],
        sd_adapter: Any,
        folder: Path,
        options: CheckpointHooks,
    ) -> None:
        """``config`` is TorchTitan's of its checkpoints, and ``folder`` where it has them."""
        self._path: str = config.initial_load_path or ""
        self._in_hf: bool = config.initial_load_in_hf
        self._parts = list(model_parts)
        self._adapter = sd_adapter
        self._folder = folder
        self._allowed: dict[str, Any] = {"allow_missing": options.allow_missing, "allow_extra": options.allow_extra}
        self._repair = options.repair_buffers
        self._allow_config = options.allow_config
        self._source: Source | None = None
        self._has_rest = False  # whether an initial load has more than weights: initial_load_model_only=False
        self._ranks = Ranks()

    def before(self, state_dict: dict[str, Any], checkpoint: Path, form: Form) -> dict[str, Any]:
        """TorchTitan is about to load from ``checkpoint``: what it is to ask for. All ranks; communicates.

        Raises:
            MismatchError, InitialLoadError: what it asks for is not there, or is dropped on the way, or more is there.
                Nothing was loaded.
            RankFailedError: the same, on all ranks.
        """
        if not self._is_initial(checkpoint):
            self._say_what_is_not_used(checkpoint)
            self._ranks.gather(f"looking at {checkpoint}", lambda: refuse_unlike(state_dict, checkpoint))
            return state_dict
        self._has_rest = any(not isinstance(value, Tensor) for value in state_dict.values())
        self._compare_settings(checkpoint)
        absent: list[str] = []
        self._ranks.gather(
            f"looking at {checkpoint}", lambda: absent.extend(self._compare(state_dict, checkpoint, form))
        )
        kept: list[str] = []
        if form is Form.HF:
            found = verify_names(self._parts, checkpoint, **self._in_files(), **self._allowed, ranks=self._ranks)
            absent += found.missing
            # Buffers that no files have keep the values of the new model.
            kept += self._names.leaves_out(LiveWeights(self._parts).specs)
        # What the load leaves out still has these values afterwards, and is found by them.
        poison_weights(self._parts, spare=[*absent, *kept])
        return {name: value for name, value in state_dict.items() if name not in absent}

    def after(self, checkpoint: Path, form: Form, state: Callable[[], dict[str, Any]]) -> None:
        """It has loaded. All ranks; communicates.

        Args:
            checkpoint: The directory that was loaded.
            form: How TorchTitan has read it.
            state: What the run holds now, as a save has it.

        Raises:
            DamagedStepError: a step holds other values than were saved.
            InitialLoadError: the model does not hold what the checkpoint does.
            MismatchError: tensors were left out.
        """
        if not self._is_initial(checkpoint):
            # Only a manifest says what was saved.
            if (checkpoint / METADATA_FILE).is_file():
                self._verify_state(checkpoint, state)
            self._verify_buffers(checkpoint)
            return
        if form is Form.QUANTIZED:
            self._ranks.gather(f"looking at what was loaded from {checkpoint}", lambda: self._refuse_poison(checkpoint))
            self._verify_buffers(checkpoint)
            log.warning("%s is quantized: that nothing was left out is verified, the values are not", checkpoint)
            return
        parts, how = self._parts, self._in_files() if form is Form.HF else {"fresh": self._fresh()}
        if form is Form.DCP and (held := held_alone(parts, checkpoint)):
            parts, how = held, {"config": recorded_config(checkpoint)}
        verify_loaded(parts, checkpoint, **how, **self._allowed, repair_buffers=self._repair, ranks=self._ranks)
        if self._has_rest:
            self._verify_rest(checkpoint, state)

    def nothing_loaded(self) -> None:
        """It has loaded nothing. Raises CheckpointNotFoundError if it was told to."""
        if self._path or self._in_hf:
            wanted = f"initial_load_path={self._path}" if self._path else "initial_load_in_hf"
            raise CheckpointNotFoundError(
                self._folder,
                f"holds no checkpoint, but because it exists TorchTitan has ignored {wanted}: the run would start from "
                "random weights. Nothing was loaded; remove the empty folder",
            )

    def find_damage(self, checkpoint: Path) -> str:
        """What is wrong with the files of a step that has a manifest; all ranks read a share. Empty if nothing is."""
        if not (checkpoint / METADATA_FILE).is_file():
            return ""
        ranks = self._ranks
        found: list[str] = ranks.agree(
            f"looking for damage in {checkpoint}",
            lambda: find_damage(checkpoint, part=ranks.rank, parts=ranks.size),
            lambda parts: [line for lines in parts for line in lines],
        )
        return "; ".join(found)

    def _verify_state(self, checkpoint: Path, state: Callable[[], dict[str, Any]]) -> None:
        """All that a run resumes with has the digests that were recorded when it was saved. All ranks; communicates."""
        try:
            self._compare_digests(checkpoint, state)
        except (CorruptCheckpointError, RankFailedError) as error:
            raise DamagedStepError(checkpoint, str(error)) from error

    def _verify_rest(self, checkpoint: Path, state: Callable[[], dict[str, Any]]) -> None:
        """An initial load has taken the optimizer and all else, too: as for a resume. All ranks; communicates.

        Raises:
            RankFailedError, CorruptCheckpointError: a tensor has another digest than was recorded.
        """
        if (checkpoint / METADATA_FILE).is_file():
            self._compare_digests(checkpoint, state)
        elif self._ranks.is_leader:
            log.warning(
                "%s has no %s: of what was loaded from it the weights are verified, the optimizer and the rest are not",
                checkpoint,
                METADATA_FILE,
            )

    def _compare_digests(self, checkpoint: Path, state: Callable[[], dict[str, Any]]) -> None:
        read: list[CheckpointMetadata] = []
        self._ranks.gather("reading the manifest", lambda: read.append(read_metadata(checkpoint)))
        count = verify_state(self._ranks, only_recorded(state(), read[0]), checkpoint, read[0])
        if self._ranks.is_leader:
            log.info("%d tensors equal those that were saved in %s (digests recorded)", count, checkpoint)

    def _verify_buffers(self, checkpoint: Path) -> None:
        """No checkpoint holds the non-persistent ones. All ranks; communicates.

        Raises:
            InitialLoadError: one is wrong and stays so. What no model can be made anew for is not looked at: the run
                has trained with it before.
        """
        how: dict[str, Any] = {"fresh": self._fresh(), "repair_buffers": self._repair, "ranks": self._ranks}
        try:
            repaired = verify_buffers(self._parts, checkpoint, **how, allow_missing=("*",))
        except InitialLoadError:
            raise
        except (UsageError, RankFailedError) as error:
            log.warning("the non-persistent buffers of this run are not verified: %s", error)
            return
        if repaired and self._ranks.is_leader:
            log.warning("non-persistent buffers were wrong and were repaired: %s", ", ".join(repaired))

    def _compare_settings(self, checkpoint: Path) -> None:
        """Compare what the trainer computes with and the config of the source. All ranks; communicates.

        Raises:
            InitialLoadError: a setting differs. Nothing was loaded.
        """
        if any(find_held(part) is not None for part in self._parts):
            return  # a model of transformers is compared with its config by the verification itself
        live, assets = LiveWeights(self._parts), getattr(self._adapter, "hf_assets_path", None)
        self._source, faults = faults_on_all(
            self._ranks, live, lambda: find_source(checkpoint, assets, live), self._adapter, self._allow_config
        )
        if self._source is None and self._ranks.is_leader:
            log.warning("no config says what the model of %s computes: the trainer's is not compared", checkpoint)
        if faults:
            raise InitialLoadError(
                checkpoint,
                f"the trainer does not compute what this model does: {len(faults)} settings differ",
                [str(fault) for fault in faults],
                "Nothing was loaded. Correct the trainer's config, or let it differ with "
                f"allow_config=[{quoted(faults)}].",
                [fault.code for fault in faults],
            )

    def _is_initial(self, checkpoint: Path) -> bool:
        """Whether it is one to start from: somewhere else, or step 0, of which TorchTitan loads the model only."""
        # Links resolved, as the folder of a run may be one.
        return checkpoint.parent.resolve() != self._folder.resolve() or checkpoint.name == step_name(0)

    def _say_what_is_not_used(self, checkpoint: Path) -> None:
        unused = [self._path] if self._path else []
        if 0 in committed_steps(self._folder):
            unused.append(str(self._folder / step_name(0)))
        if unused and self._ranks.is_leader:
            log.warning(
                "%s outranks %s, which is not loaded. If it is of another run, remove it or choose another folder",
                checkpoint,
                " and ".join(unused),
            )

    def _compare(self, state_dict: Mapping[str, Any], checkpoint: Path, form: Form) -> list[str]:
        """What the checkpoint lacks, as it may. Raises if it lacks more."""
        if form is not Form.DCP:
            if self._adapter is None:
                raise UsageError(
                    "this model has no state-dict adapter, without which TorchTitan reads no Hugging Face directory: "
                    "convert it with shardsmith to-dcp --layout nested, and leave initial_load_in_hf out"
                )
            self._refuse_dropped(state_dict, checkpoint)
            return []
        index = index_of(checkpoint)
        asked = flatten_state_dict(dict(_values(state_dict)))[0]
        # What may be missing is not asked for; dcp.load would raise for it.
        absent = [n for n in asked if n not in index.tensors and matches(n, self._allowed["allow_missing"])]
        compare({name: value for name, value in asked.items() if name not in absent}, index, allow_cast=True)
        return absent

    def _in_files(self) -> dict[str, Any]:
        """How the tensors of a Hugging Face directory become those of the model."""
        return {"names": self._names, "fresh": self._fresh()}

    @functools.cached_property
    def _names(self) -> RunNames:
        """All ranks ask for it at the same point; communicates."""
        buffers = [clean_fqn(name, part) for part in self._parts for name, _ in part.named_buffers()]
        return RunNames(self._adapter, names_on_all(self._ranks, buffers), self._fresh())

    def _refuse_dropped(self, state_dict: Mapping[str, Any], checkpoint: Path) -> None:
        tensors = {name: value for name, value in state_dict.items() if isinstance(value, Tensor)}
        empty = {name: torch.empty(value.shape, dtype=value.dtype, device="meta") for name, value in tensors.items()}
        # There and back again: what the adapter drops on the way does not come back. On meta, as only names matter.
        kept = self._adapter.from_hf(self._adapter.to_hf(dict(empty)))
        tied = LiveWeights(self._parts).tied
        buffers = {clean_fqn(name, part) for part in self._parts for name, _ in part.named_buffers()}
        # A tied weight comes back under its other name; files need not have buffers.
        lost = [n for n in tensors if n not in kept and tied.get(n) not in kept and n not in buffers]
        if lost:
            adapter = type(self._adapter).__name__
            raise MismatchError(
                checkpoint,
                f"{len(lost)} of {len(tensors)} tensors have no name in it that {adapter} knows",
                [f"{name}: dropped by {adapter}.to_hf, would keep its random values" for name in lost],
                "Nothing was loaded. Convert it with shardsmith to-dcp, which loses none.",
            )

    def _refuse_poison(self, checkpoint: Path) -> None:
        live = LiveWeights(self._parts)
        left = [name for name in live.specs if any(look.poisoned for _, look in live.look(name))]
        if left:
            raise MismatchError(
                checkpoint,
                f"{len(left)} of {len(live.specs)} tensors were not, or not wholly, loaded from it",
                [f"{name}: still has what it was filled with before the load" for name in left],
                "The run must not start like this.",
            )

    def _fresh(self) -> Fresh | None:
        """How to make one of TorchTitan's own models anew, for its buffers; None for those of transformers.

        The rotary tables are those of the source's config where that is known: a model that is made from the trainer's
        config has the trainer's mistakes.
        """
        make, source = self._maker(), self._source
        rope = source.rope if source is not None and not self._lets_rope_differ else None
        if make is None or source is None or rope is None:
            return make
        return Reference(make, rope, source.origin)

    @property
    def _lets_rope_differ(self) -> bool:
        return any(pattern.startswith(("rope", "*")) for pattern in self._allow_config)

    def _maker(self) -> Callable[[], nn.Module] | None:
        config: Any = getattr(self._adapter, "model_config", None)
        # 0.3
        if hasattr(config, "build"):
            return lambda: config.build()
        model: Any = self._parts[0]
        # 0.2
        if hasattr(model, "model_args") and not hasattr(model, "config"):
            return lambda: _make_0_2(own_class(model), model.model_args)
        return None


def is_remote(*paths: str) -> bool:
    """Return whether any is a URI, such as gs://bucket, which TorchTitan reads and this package does not."""
    return any("://" in path for path in paths)


def stored_keys(checkpoint: Path) -> set[str]:
    """Return the first parts of the keys that a step has."""
    return {key.split(".", 1)[0] for key in index_of(checkpoint).tensors}


def without_absent(state_dict: dict[str, Any], checkpoint: Path, keys: Sequence[str]) -> dict[str, Any]:
    """Of what is to be loaded, all but those of ``keys`` that a checkpoint was made without: it had no average then."""
    stored = stored_keys(checkpoint)
    absent = [key for key in keys if key in state_dict and key not in stored]
    if absent:
        log.warning("%s holds no average: it starts from the weights that are loaded", checkpoint)
    return {key: value for key, value in state_dict.items() if key not in absent}


def _make_0_2(kind: Any, arguments: Any) -> nn.Module:
    """A model of 0.2 as its trainer has it: GPT-OSS casts all that a layer has, and makes some buffers anew then."""
    model: nn.Module = kind(arguments)
    model.init_weights(buffer_device=torch.device("cpu"))  # type: ignore[operator]
    return model


def _values(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """With what is in the stateful things in it."""
    return {k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in state_dict.items()}
