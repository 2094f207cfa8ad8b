"""The options of ``HFExport`` and ``ShardedSave`` by subject, and how their flat keywords become the same objects."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar

from torch import Tensor

from shardsmith.checking.arguments import checked_fields
from shardsmith.checking.types import AnyPath, Count, Directory, Dtype, HasFiles, LocalPath, Seconds, Size
from shardsmith.errors import UsageError
from shardsmith.manifest.retention import Retention
from shardsmith.name_maps.maps import NameMap

from .checkpoint_source import Saves
from .view import View

T = TypeVar("T")


@checked_fields
@dataclass(frozen=True, kw_only=True, slots=True)
class ExportFiles:
    """The files that an export has beside its weights."""

    base_model: AnyPath | None = None
    """Local directory with config, tokenizer and so on, which are copied; or the Hub name of a model in the local
    cache, such as ``"openai-community/gpt2"``. Without one, config.json and generation_config.json come from the live
    model, if it is one of transformers."""
    processor: HasFiles | None = None
    """Tokenizer or processor to save in each directory, instead of the base model's."""
    extra_files: Mapping[str, LocalPath] | None = None
    """More files to copy, by their name in the directory."""
    extra_facts: Mapping[str, Callable[[], Any]] | None = None
    """More files to write, as JSON, by their name: the answer of a function when live weights are staged. All ranks
    call it, on the main thread; the answer of rank 0 is written."""
    trust_remote_code: bool = False
    """Copy all Python files of the base model, not only those that its configs name. They are not run."""


@checked_fields
@dataclass(frozen=True, kw_only=True, slots=True)
class ExportWeights:
    """Where the weights of an export come from, and how its weight files name and divide them."""

    source: Literal["live", "checkpoint", "auto"] = "live"
    """``"live"``: the live weights. ``"checkpoint"``: the step's committed checkpoint, which retention keeps meanwhile;
    the training does not wait, and nothing is staged. ``"auto"``: the live weights if a trial at the start shows that
    they can be exported (they cannot if ranks hold different models, as pipeline stages); else the checkpoint."""
    checkpoints: Saves | None = None
    """The ``ShardedSave`` of the run, for ``source="checkpoint"`` or ``"auto"``. It must save every step that is
    exported, and come before the export in ``Hooks``."""
    names: str | NameMap = "auto"
    """``"auto"`` writes the names and tensors that ``save_pretrained`` of transformers would (experts one by one, where
    the model fuses them), ``"identity"`` those of the model. Else a ``NameMap``, or the name of one that a package
    offers."""
    max_shard_size: Size | None = "5GB"
    """Several files with an index if the weights are larger; None makes one file."""
    ema_as: Literal["file", "directory"] = "file"
    """``"file"`` puts ``ema.safetensors`` beside the main weights, ``"directory"`` makes ``step-<n>-ema``."""
    adapters: Literal["adapter", "merged"] | View = "adapter"
    """For a model of peft: ``"adapter"`` writes the files of its ``save_pretrained``, main weights and average each in
    a directory of its own; ``"merged"`` the whole model with the adapter merged into its weights. For adapters of
    another kind, an object that says how they are written (``shardsmith.hooks.view.View``)."""
    stages: bool = False
    """The model is a stage of a pipeline, other ranks have the others, and the directory holds all of them."""


@checked_fields
@dataclass(frozen=True, kw_only=True, slots=True)
class ExportWriting:
    """How exports are written in the background, what happens when one is late or fails, and where it goes then."""

    write_mode: Literal["slices", "files"] = "slices"
    """``"slices"``: every rank writes its own slices of every file. ``"files"``: every file is written by one rank
    alone, to which the others send their slices over a Gloo group; for NFS and the like, where two hosts must not write
    one file. Then let ``max_shard_size`` give a file for each host."""
    staging: Literal["copy", "overlap"] = "copy"
    """``"copy"`` copies the weights before the training goes on. ``"overlap"`` copies them, and the average, during the
    next forward and backward; ``step()`` of any optimizer of torch waits for the rest. Buffers, and tensors below 32
    KB, are copied at once. If anything else changes the others before that, the export fails on all ranks and names
    them."""
    max_host_memory: Size | None = None
    """The most CPU memory that a rank's copies of the weights may take, such as ``"8GB"``; two exports may be on their
    way, and the average may have a directory of its own, and each of these gets an equal share of it. What does not fit
    into its share is copied in parts, each while the one before is written, and the training waits for that. Only with
    ``write_mode="slices"``. None: no bound."""
    when_busy: Literal["wait", "skip", "raise"] = "wait"
    """What to do if one export is being written and one waits behind it: ``"wait"`` until there is room, ``"skip"``
    this one, or ``"raise"``."""
    on_error: Literal["raise", "warn"] = "raise"
    """What a failed export does: ``"raise"`` on all ranks after the same step, or ``"warn"`` in the log."""
    on_exported: Callable[[int, Path], None] | None = None
    """Called on every rank, on the main thread, when a directory has been published: step and path."""
    timeout_secs: Seconds = 1800.0
    """How long to wait for a rank before an export is given up, in seconds; also for a checkpoint to be saved."""
    push_to_hub: str | None = None
    """A repository, such as ``"org/name"``, made if missing. Rank 0 uploads each export as one commit, in a thread of
    its own, with the token of ``hf auth login`` or ``HF_TOKEN``; the training does not wait, its end does."""
    revision: str = "step-{step}"
    """The branch, made if missing: one for each step, or one for all, such as ``"main"``. What it held is replaced."""
    push_private: bool = True
    """Whether a repository that is made is private."""
    on_push_error: Literal["warn", "raise"] = "warn"
    """What a push does that fails after all its attempts: ``"warn"`` in the log, with the command that pushes the
    export later, or ``"raise"`` on all ranks after the same step."""


@checked_fields
@dataclass(frozen=True, kw_only=True, slots=True)
class ExportVerification:
    """How each export is verified before it is published."""

    verify: Literal["digest", "load"] = "digest"
    """``"digest"``: the tensors in the files must be those that were staged, bit for bit. ``"load"``: another process
    also loads each directory with ``from_pretrained`` before it is published, and must get the logits of the live
    model, up to rounding. Costs one forward of all ranks, for which the training waits, and on rank 0's host memory for
    the model in float32."""
    verify_inputs: Mapping[str, Tensor] | None = None
    """Inputs for ``verify="load"``: keyword arguments of ``forward``. None makes some up, for text, images and
    sound."""
    verify_with: Callable[..., Any] | None = None
    """How the live model answers those inputs; None calls it with them. For a model that is exported in another form
    than it is trained in."""
    compare_replicas: Literal["first", "never"] | Count = "first"
    """When to compare, across the ranks, the live tensors that several of them hold, such as all of them under DDP: at
    the ``"first"`` export, at the first and every so many exports, or ``"never"``."""


class ExportOptions(TypedDict, total=False):
    """The fields of the four objects above as keywords of ``HFExport`` itself."""

    base_model: AnyPath | None
    processor: HasFiles | None
    extra_files: Mapping[str, LocalPath] | None
    extra_facts: Mapping[str, Callable[[], Any]] | None
    trust_remote_code: bool
    source: Literal["live", "checkpoint", "auto"]
    checkpoints: Saves | None
    names: str | NameMap
    max_shard_size: Size | None
    ema_as: Literal["file", "directory"]
    adapters: Literal["adapter", "merged"] | View
    stages: bool
    write_mode: Literal["slices", "files"]
    staging: Literal["copy", "overlap"]
    max_host_memory: Size | None
    when_busy: Literal["wait", "skip", "raise"]
    on_error: Literal["raise", "warn"]
    on_exported: Callable[[int, Path], None] | None
    timeout_secs: Seconds
    verify: Literal["digest", "load"]
    verify_inputs: Mapping[str, Tensor] | None
    verify_with: Callable[..., Any] | None
    compare_replicas: Literal["first", "never"] | Count
    push_to_hub: str | None
    revision: str
    push_private: bool
    on_push_error: Literal["warn", "raise"]


@checked_fields
@dataclass(frozen=True, kw_only=True, slots=True)
class SaveWriting:
    """How ``ShardedSave`` writes a checkpoint."""

    async_mode: Literal["async", "disabled"] = "async"
    """``"async"`` copies the state to CPU memory, returns, and writes in the background, one save at a time;
    ``"disabled"`` returns when the checkpoint is committed."""
    staging: Literal["copy", "overlap"] = "copy"
    """``"copy"`` copies the state before the training goes on. ``"overlap"`` copies parameters, the optimizer's state
    and the average during the next forward and backward, but for tensors below 32 KB; ``optimizer.step()`` waits for
    the rest. If anything else changes them before that, the save fails on all ranks and names them. Needs
    ``async_mode="async"``."""
    max_host_memory: Size | None = None
    """The most CPU memory that a rank's copy of the state may take, such as ``"8GB"``. A state that is larger is copied
    in parts, each while the one before is written, and the training waits for that. One tensor's part on a rank (1 GiB
    at most) is copied whole. None: no bound."""
    prewarm: bool = False
    """Allocate the memory of the copies, and agree on who writes what, after the first step instead of at the first
    save, which then pays for neither. Too little memory is an error at the first step. Needs ``async_mode="async"``."""
    layout: Literal["flat", "nested"] = "flat"
    """``"nested"`` puts the model's keys under ``model.``, as TorchTitan before 0.2 wants them."""
    latest_link: bool = False
    """Keep a link ``latest`` in the directory that leads to the newest step: for servers that follow the run. It is
    replaced in one go after each save, and before an older step is removed."""
    on_saved: Callable[[int, Path], None] | None = None
    """Called with step and directory when a checkpoint is committed: on all ranks, on the main thread, by ``Hooks``;
    ranks may get there during different steps. What it raises fails no save; all ranks raise it after the same
    step."""
    compare_replicas: Literal["first", "never"] | Count = "first"
    """When to compare, across the ranks, the tensors that several of them hold, such as all of them under DDP: at the
    ``"first"`` save, at the first and every so many saves, or ``"never"``."""
    timeout_secs: Seconds = 1800.0
    """How long to wait for a rank before a save is given up, in seconds."""
    local_cache: Directory | None = None
    """For a run that saves to an object store: a folder on each host's own disk. Steps are committed there, and
    uploaded to the store in the background; a resume takes the newest that is sound, wherever it is."""
    keep_local: Retention | None = Retention(newest=2)  # noqa: RUF009  # frozen
    """Which steps stay in that folder once they are uploaded; None keeps all. ``keep`` is for the store."""


@checked_fields
@dataclass(frozen=True, kw_only=True, slots=True)
class SaveWeights:
    """In which files ``ShardedSave`` writes the weights, and what it puts beside them."""

    weights: Literal["dcp", "huggingface"] = "dcp"
    """``"dcp"``: in the ``.distcp`` files, with all else. ``"huggingface"``: the step's directory is a Hugging Face
    directory, too, and its folder ``ema`` is one of the average; ``.distcp`` files hold the rest."""
    base_model: AnyPath | None = None
    """As in ``ExportFiles``; so are the others."""
    processor: HasFiles | None = None
    extra_files: Mapping[str, LocalPath] | None = None
    trust_remote_code: bool = False
    names: str | NameMap = "auto"
    """As in ``ExportWeights``."""
    max_shard_size: Size | None = "5GB"
    """Several files with an index if the weights are larger; None makes one file."""
    weights_dtype: Dtype | None = None
    """The dtype of the files; None is that which trains. ``"bfloat16"`` beside float32 parameters writes what the files
    lack in a folder ``float32-rest``, two bytes an element, so that a resume has every bit of them; so for the average.
    Any other dtype than that which trains is refused: it would not come back bit for bit."""


class SaveOptions(TypedDict, total=False):
    """The fields of ``SaveWriting`` and ``SaveWeights`` as keywords of ``ShardedSave`` itself."""

    weights: Literal["dcp", "huggingface"]
    base_model: AnyPath | None
    processor: HasFiles | None
    extra_files: Mapping[str, LocalPath] | None
    trust_remote_code: bool
    names: str | NameMap
    max_shard_size: Size | None
    weights_dtype: Dtype | None

    async_mode: Literal["async", "disabled"]
    staging: Literal["copy", "overlap"]
    max_host_memory: Size | None
    prewarm: bool
    layout: Literal["flat", "nested"]
    latest_link: bool
    on_saved: Callable[[int, Path], None] | None
    compare_replicas: Literal["first", "never"] | Count
    timeout_secs: Seconds
    local_cache: Directory | None
    keep_local: Retention | None


def merge(owner: str, argument: str, kind: type[T], given: T | None, options: Mapping[str, Any]) -> T:
    """Return the options of one subject, given as an object or as keywords of ``owner`` itself.

    Args:
        owner: The class to name in the error.
        argument: The name of its argument for the object.
        kind: The class of the object.
        given: The object; None if there is none.
        options: Keywords, also those of other subjects.

    Raises:
        UsageError: both are given.
    """
    names = [field.name for field in fields(kind) if field.name in options]  # type: ignore[arg-type]
    if given is None:
        return kind(**{name: options[name] for name in names})
    if names:
        keywords, inside = " and ".join(f"{name}=" for name in names), ", ".join(f"{name}=..." for name in names)
        raise UsageError(
            f"{owner}: {keywords} given beside {argument}=; write {argument}={kind.__name__}({inside}, ...). "
            "Nothing was done."
        )
    return given
