"""What of a base model's directory belongs beside new weights. What a file holds decides, not what it is called.

A file whose tensors are the model's is the model's weights under whatever name, and a loader may prefer that name: it
is never copied. Weights of other parts, such as BAGEL's ``ae.safetensors``, are.
"""

from __future__ import annotations

import fnmatch
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from shardsmith.errors import CheckpointError, CheckpointNotFoundError, UnsafeCheckpointError
from shardsmith.formats.safetensors_files.source import SafetensorsSource
from shardsmith.formats.torch_files.files import read_torch_file
from shardsmith.ground.layout import COMPANION, METADATA_FILE, MODEL_CONFIG_FILE, PROVENANCE_FILE
from shardsmith.ground.local_copy import first_bytes, names_below
from shardsmith.hf.model_card import is_own_card
from shardsmith.hf.model_code import code_beside
from shardsmith.hf.other_formats import other_format
from shardsmith.manifest.metadata import has_manifest, read_json, read_metadata
from shardsmith.tensors.tensors import Shape, TensorSpec

_INDEXES = ("*.safetensors.index.json", "*.bin.index.json")
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt")
_READ_BY_LOADERS = (
    *("model*.safetensors*", "diffusion_pytorch_model*", "pytorch_model*", "tf_model*", "flax_model*", "consolidated*"),
    # Of peft: beside whole weights from_pretrained would load them on top.
    *("adapter_model*", "adapter_config.json"),
)
"""In the top folder: weights, indexes of any variant and what is called like them, such as a copy put aside."""
_LEFTOVERS = (
    # transformers' Trainer, and what is built on it
    *("trainer_state.json", "trainer_log.jsonl", "training_args.*", "training_loss.*", "running_log.txt"),
    *("all_results.json", "train_results.json", "eval_results.json", "predict_results.json", "test_results.json"),
    *("optimizer*", "scheduler*", "scaler.pt", "rng_state*"),
    # accelerate
    *("random_states*", "sampler*.bin", "dl_state_dict*.bin", "custom_checkpoint_*.pkl"),
    # DeepSpeed
    *("latest", "latest_universal", "zero_to_fp32.py", "*_optim_states.pt", "*_model_states.pt", "mp_rank_*.pt"),
    # Megatron, Lightning, verl, and torch's distributed checkpoints
    *("latest_checkpointed_iteration.txt", "latest_train_state.pt", "common.pt", "distrib_optim*", "run_config.yaml"),
    *("hparams.yaml", "model_world_size_*", "optim_*", "extra_state_world_size_*", "fsdp_config.json", "*.distcp"),
    "events.out.tfevents*",
)
"""Of the run that made the base. ``scheduler_config.json`` of diffusers is in a folder below, where these stay."""
_FOLDERS = re.compile(
    r"\.|checkpoint[-_][0-9]|checkpoint-|global_step_?[0-9]|step[-_][0-9]|iter_[0-9]|epoch[-_=]?[0-9]|mp_rank_"
    r"|pytorch_model_fsdp|optimizer_|(pytorch_model|runs|wandb|mlruns|swanlog|lightning_logs|tensorboard|__pycache__)$"
    rf"|{COMPANION}$"
)
"""Beginnings of folders that are no part of a model: steps of a run, and what it logged."""
_WRAPPER = re.compile(r"^(module|_orig_mod|model|base_model)\.")
# Beginnings of torch's files: a zip archive, and a pickle of protocol 2, as before torch 1.6.
_TORCH_MAGIC = (b"PK\3\4", b"\x80\2")
# Share of the tensors, or of the model's matrices, from which a file is the model's.
_MOSTLY = 0.5
_NAMED = 5


@dataclass(frozen=True, slots=True)
class BaseFiles:
    """The files of a base model."""

    copies: tuple[str, ...]
    """Relative paths of what belongs beside new weights, sorted."""
    weights: Mapping[str, int] = field(default_factory=dict)
    """Those among them that hold tensors -> size in bytes: other parts of the model."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """What is not copied although nothing in its name says so -> why."""
    unread: Mapping[str, str] = field(default_factory=dict)
    """Weights in formats that are not read here, which are not copied -> whose format it is."""

    @property
    def not_copied(self) -> dict[str, str]:
        """All that is left out and may hold weights -> why."""
        kinds = {name: f"the base model's weights in the format of {kind}" for name, kind in self.unread.items()}
        return {**self.left_out, **kinds}

    @property
    def unread_lines(self) -> list[str]:
        """What is said of ``unread``: a line for each format, however many files it has."""
        by_project: dict[str, list[str]] = {}
        for name, project in self.unread.items():
            by_project.setdefault(project, []).append(name)
        return [
            f"not copied, since they would hold the base model's weights, in the format of {project}: "
            f"{', '.join(names[:_NAMED])}{f' and {len(names) - _NAMED} more' if len(names) > _NAMED else ''}"
            for project, names in by_project.items()
        ]

    def log_what_is_unexpected(self, log: logging.Logger) -> None:
        """Log weights of other parts, which are copied, and weights in other formats, which are not."""
        for name, size in self.weights.items():
            log.info("%s of the base model (%s bytes) holds other weights, and is copied", name, size)
        for line in self.unread_lines:
            log.info("%s", line)


def choose_files(
    base: Path, model: Mapping[str, TensorSpec] | None = None, *, trust_remote_code: bool = False
) -> BaseFiles:
    """Decide which files of the base belong beside the new weights. Reads headers of weight files, no weights.

    Args:
        base: The base model's directory.
        model: The tensors of the model, by any names that files may have for them.
        trust_remote_code: All Python files; else those that its configs name, and what these import.

    Raises:
        CheckpointNotFoundError: no such directory.
        UnsafeCheckpointError: a file is no regular file, such as a pipe or a link that leads nowhere.
    """
    if not base.is_dir():
        raise CheckpointNotFoundError(base, "the base model must be a directory with at least its config.json")
    judge = _Judge(base, model or {})
    found = list(_files(base, trust_remote_code=trust_remote_code))
    unread = {name: project for name in found if (project := other_format(base, name)) is not None}
    names = [name for name in found if name not in unread]
    for name in names:
        if not (base / name).is_file():
            raise UnsafeCheckpointError(base / name, "is not a regular file, so it cannot be copied; remove it")
    left_out: dict[str, str] = {}
    for name in names:
        if _like(name, _WEIGHTS) and (reason := judge.reason_against(name)) is not None:
            left_out[name] = reason
    # What a loader looks for is left out by its name alone,
    # whatever it holds: it would be loaded beside the new weights.
    copies = {name for name in names if name not in left_out and not ("/" not in name and is_read_by_loaders(name))}
    # An index goes with all of its files or not at all: a loader would fail at the first that is missing.
    copies -= {name for name in copies if _like(name, _INDEXES) and not _indexed(base / name) <= copies}
    weights = {name: (base / name).stat().st_size for name in sorted(copies) if name in judge.weights}
    return BaseFiles(tuple(sorted(copies)), weights, left_out, unread)


def is_read_by_loaders(name: str) -> bool:
    """Return whether a loader takes a file of this name, in the top folder, for weights or a part of them."""
    return _like(name, _READ_BY_LOADERS)


class _Judge:
    """Knows the model's tensors, and says of a file whether it may be copied."""

    def __init__(self, base: Path, model: Mapping[str, TensorSpec]) -> None:
        self.weights: set[str] = set()
        self._base = base
        self._names = set(model)
        # Vectors say nothing: many parts have some of the same length.
        self._shapes = Counter(spec.shape for spec in model.values() if len(spec.shape) > 1)

    def reason_against(self, name: str) -> str | None:
        """Why a file is not to be copied; None if it may be."""
        if "/" not in name and name.startswith(("model", "ema", "pytorch_model", "diffusion_pytorch_model")):
            return "weights of the base model, by its name"
        try:
            specs = tensors_of(self._base / name)
        except CheckpointError as error:
            return f"cannot be read as weights, so nobody knows of what ({type(error).__name__})"
        if specs is None:
            return None
        self.weights.add(name)
        if any(".lora_" in tensor for tensor in specs):
            return "an adapter"
        if self._is_model(specs):
            return "weights of the model itself"
        return None

    def _is_model(self, specs: Mapping[str, TensorSpec]) -> bool:
        """By names; or, under names of another project, by the shapes of nearly all matrices."""
        if not specs:
            return False
        # Half is enough: files may have fused or split tensors where the model has not.
        known = sum(name in self._names or _WRAPPER.sub("", name) in self._names for name in specs)
        return known >= _MOSTLY * len(specs) or self._has_shapes(spec.shape for spec in specs.values())

    def _has_shapes(self, shapes: Iterable[Shape]) -> bool:
        found = Counter(shape for shape in shapes if len(shape) > 1)
        # As multisets: a shape counts as often as both have it.
        common = (found & self._shapes).total()
        return bool(common) and common >= 0.9 * found.total() and common >= _MOSTLY * self._shapes.total()


def _files(base: Path, *, trust_remote_code: bool) -> Iterable[str]:
    """Relative paths of what nothing speaks against but its content."""
    python = () if trust_remote_code else ("*.py",)
    code = code_beside(base)
    of_checkpoint = _of_checkpoint(base)
    for folder, folders, names in names_below(base):
        # In place: ``os.walk`` and what is like it do not go into a folder that was taken out of the list.
        folders[:] = sorted(name for name in folders if not _FOLDERS.match(name) and name not in of_checkpoint)
        top = folder == base
        unwanted = (PROVENANCE_FILE, ".*", *python)
        if top:
            unwanted += (*_LEFTOVERS, *of_checkpoint)
        for name in sorted(names):
            relative = str((folder / name).relative_to(base))
            if relative in code or not (_like(name, unwanted) or is_own_card(folder / name)):
                yield relative


def _of_checkpoint(base: Path) -> set[str]:
    """Names of what a base has as a checkpoint of ours, if it is one: its manifest, and the folder of an average."""
    if not has_manifest(base):
        return set()
    weights = read_metadata(base).weights or {}
    return {METADATA_FILE, MODEL_CONFIG_FILE, *(record.folder for record in weights.values() if record.folder)}


def tensors_of(path: Path) -> Mapping[str, TensorSpec] | None:
    """Return the tensors in a file; None if it is no file of tensors. Raises CheckpointError if it cannot be read."""
    if path.suffix != ".safetensors":
        # Suffixes such as .bin are used for other data, too; only files of torch begin so.
        if not first_bytes(path, 4).startswith(_TORCH_MAGIC):
            return None
        held = {".".join(map(str, keys)): one for keys, one in read_torch_file(path, follow_links=True).items()}
        return {name: TensorSpec(name, one.shape, one.dtype) for name, one in held.items()}
    source = SafetensorsSource(path)
    source.close()
    return source.specs


def files_of(base: Path, files: Iterable[str], names: Iterable[str]) -> list[str]:
    """Return the files of a base all of whose tensors are among these names, whatever a name begins with."""
    ends = {name[at:] for name in names for at in [0, *(m.end() for m in re.finditer(r"\.", name))]}
    return [file for file in files if (specs := tensors_of(base / file)) and specs.keys() <= ends]


def _indexed(index: Path) -> set[str]:
    """The files that an index names."""
    try:
        return set(read_json(index)["weight_map"].values())
    except (CheckpointError, KeyError, AttributeError, TypeError):
        # An index that nobody can follow names a file that is never copied, so it is left out itself.
        return {""}  # no index that anyone could follow


def _like(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(os.path.basename(name), pattern) for pattern in patterns)
