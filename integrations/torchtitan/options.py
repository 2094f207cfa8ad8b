"""What can be attached to TorchTitan, option by option. The same names in 0.3's override and in 0.2's TOML table."""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from shardsmith.checking.arguments import check_value
from shardsmith.checking.types import AnyPath, LocalPath, Place, Size
from shardsmith.errors import UsageError

_OF_ONE_WRITE = ("export_base_model", "export_max_shard_size", "export_router_bias")
"""What of the exports' options holds for steps that are Hugging Face directories."""
_KINDS = {"export_folder": Place, "export_base_model": AnyPath, "events": LocalPath, "max_host_memory": Size}
"""What strings among the options must be."""


@dataclass(kw_only=True, slots=True)
class CheckpointHooks:
    """Checkpoint hooks of Shardsmith. Without any of these nothing is attached, and a run is as it would be anyway."""

    ema_decay: float | None = None
    """Keep a float32 average of the weights with this decay, such as 0.999. It is saved in TorchTitan's own step
    folders, as ema_model.*, resumed from there, and exported. None: no average."""
    ema_warmup: bool = False
    """Let the decay grow from 0.1 to ema_decay over the first updates."""
    ema_start_step: int = 0
    """Until this step the average is a copy of the weights."""
    ema_every_n_steps: int = 1
    """Update the average at the multiples of this."""
    ema_offload: bool = False
    """Hold the average in CPU memory."""
    ema_allow_other_decay: bool = False
    """Go on with the average of a step that was kept with another decay."""

    metadata: bool = False
    """Add metadata.json to each step folder when its save has really ended: hashes, a digest per tensor, facts of the
    average. A resume is verified with it, and keep_latest_k counts no step without it. Set by ema_decay too."""
    engine: bool = False
    """Write TorchTitan's step folders with the writer of ShardedSave instead of torch's: the same keys, modes and
    names. TorchTitan reads them with and without these hooks. A folder appears when it is complete, and
    has its metadata.json then. What checkpoint.last_save_in_hf asks for is still written by TorchTitan."""
    prewarm: bool = False
    """Allocate the memory of the copies that async saves make, and agree on who writes what, after the first step
    instead of at the first save, as ShardedSave does. Needs engine and a checkpoint.async_mode other than disabled."""
    max_host_memory: str | None = None
    """Most CPU memory that a rank's copies take, such as "8GB": those of a save with engine, and as much again those of
    exports. What is larger is copied in parts, each while the one before is written; the training waits for that. None:
    no bound. Needs engine, or exports."""
    weights: Literal["dcp", "huggingface"] = "dcp"
    """"huggingface" makes each step folder a Hugging Face directory too, and its folder ema one of the average: the
    weights are in safetensors files alone, in the dtype that trains, and all else in .distcp files. Needs engine. Only
    a run with these hooks resumes from it."""
    weights_dtype: Literal["original", "bfloat16"] = "original"
    """Of weights="huggingface": "original" is the dtype that trains; "bfloat16" writes bfloat16 files, and what these
    lack to float32 masters in a folder float32-rest beside them, so that a resume has every bit."""
    save_on_sigterm: bool = True
    """On SIGTERM, which announces the end of a machine, save the step that all ranks are at and end the run with exit
    status 0. False: SIGTERM ends it at once. It has an effect where TorchTitan saves checkpoints and anything of ours
    is attached."""
    prove_load: bool = True
    """After an initial load, verify that the model holds what the checkpoint does, or stop and say what is wrong."""
    repair_buffers: bool = False
    """After a load, overwrite non-persistent buffers that are wrong with those of a model made anew, and say so. False:
    stop instead."""
    allow_missing: tuple[str, ...] = ()
    """Patterns of tensors that the checkpoint of an initial load need not have, such as "*.q_norm.weight". They keep
    the values that the model begins with, and the verification names them."""
    allow_extra: tuple[str, ...] = ()
    """Patterns of tensors of that checkpoint that the model need not have."""

    allow_config: tuple[str, ...] = ()
    """Patterns of settings, by their names in config.json, such as "rope_theta". These may differ between the trainer
    and the model that it starts from or exports; any other difference stops the run at its start."""

    export_interval: int | None = None
    """Write a complete Hugging Face directory every so many steps, whatever checkpoint.interval is."""
    export_last: bool = False
    """Write one at the last step too."""
    export_folder: str = "hf"
    """Where to, below the dump folder unless absolute. Not inside TorchTitan's checkpoint folder. Or a place in an
    object store, such as s3://bucket/run/hf."""
    export_models: Literal["main", "ema", "both", "all"] = "all"
    """Which weights to export; "all" is what there is."""
    export_ema_as: Literal["file", "directory"] = "directory"
    """The average as ema.safetensors beside the main weights, or as a directory of its own, step-<n>-ema."""
    export_dtype: str = "bfloat16"
    """Of floating-point tensors, but of those that the model's class keeps in float32; "original" keeps each's."""
    export_max_shard_size: str | None = "5GB"
    """Write several files with an index if the weights are larger than this. Of weights="huggingface", too."""
    export_keep: int | None = None
    """How many of the newest exports to keep. None: all."""
    export_base_model: str | None = None
    """Directory with config.json, generation config and tokenizer, for weights="huggingface", too. None: TorchTitan's
    hf_assets_path."""
    export_when_busy: Literal["wait", "skip", "raise"] = "wait"
    """What to do if two exports are still under way."""
    export_on_error: Literal["raise", "warn"] = "raise"
    """Whether a failed export ends the run."""

    export_verify: Literal["digest", "load"] = "digest"
    """What is verified of each export: that its files hold, bit for bit, what was staged; or also that from_pretrained
    loads it and it answers as the live model does. Costs a forward, and on rank 0 the model in memory."""
    export_lora: Literal["merged", "adapter"] = "merged"
    """Of a model that is trained with TorchTitan's LoRA: the whole model with the adapter merged into its weights, or
    the adapter alone as peft has it, main and average each in a directory."""
    export_router_bias: Literal["leave_out", "file", "refuse"] = "leave_out"
    """What to do where files of the exported model have no place for the bias by which its routers balance experts, as
    Qwen3's: leave it out and say so, write it beside the weights as router_bias.json, or refuse to start. The same for
    weights="huggingface", whose .distcp files have it for a resume."""

    events: str | None = None
    """File that gets a line of JSON for each export, each step folder that got its metadata.json, and each removal:
    "events.jsonl" below the dump folder is read by shardsmith inspect of that folder."""
    timeout_secs: float = 1800.0
    """How long to wait for a rank before a recording or an export is given up."""

    @property
    def exports(self) -> bool:
        """Whether anything is to be exported."""
        return self.export_interval is not None or self.export_last

    @property
    def one_write(self) -> bool:
        """Whether step folders are Hugging Face directories."""
        return self.weights == "huggingface"

    @property
    def records(self) -> bool:
        """Whether step folders get a metadata.json."""
        return self.metadata or self.engine or self.ema_decay is not None

    @property
    def is_idle(self) -> bool:
        """Whether nothing is attached."""
        return not (self.exports or self.records)

    def check(self) -> None:
        """Raise UsageError, naming all options at fault, if types are wrong or options contradict each other."""
        hints = get_type_hints(type(self))
        problems = [
            f"{field.name}={getattr(self, field.name)!r}: {name_of(hints[field.name])} is expected"
            for field in fields(self)
            if not _fits(getattr(self, field.name), hints[field.name])
        ]
        if not problems:
            problems = self._contradictions()
        if problems:
            raise UsageError("\n  ".join(["checkpoint_hooks: these options cannot be used", *problems]))

    def _contradictions(self) -> list[str]:
        problems = []
        ours = {field.name: getattr(self, field.name) not in (field.default, []) for field in fields(self)}
        if self.ema_decay is None:
            problems += [f"{name} needs ema_decay" for name in ours if name.startswith("ema_") and ours[name]]
            if self.export_models in ("ema", "both"):
                problems.append(f'export_models="{self.export_models}" needs ema_decay')
        if self.prewarm and not self.engine:
            problems.append("prewarm needs engine: torch's writer makes its memory itself")
        if self.max_host_memory is not None and not (self.engine or self.exports):
            problems.append("max_host_memory needs engine, or export_interval or export_last: nothing else is copied")
        if self.one_write and not self.engine:
            problems.append('weights="huggingface" needs engine: torch\'s writer puts weights into .distcp files')
        if ours["weights_dtype"] and not self.one_write:
            problems.append('weights_dtype is for weights="huggingface"')
        if self.export_lora == "adapter" and self.export_verify == "load":
            problems.append('export_verify="load" loads whole models: it goes with export_lora="merged"')
        for name, kind in _KINDS.items():
            try:
                check_value("", name, getattr(self, name), kind | None)
            except UsageError as error:
                problems.append(str(error).removeprefix(": ").removesuffix(" Nothing was done."))
        if self.timeout_secs <= 0:
            problems.append(f"timeout_secs={self.timeout_secs}: a positive number of seconds is expected")
        if not self.exports:
            also = _OF_ONE_WRITE if self.one_write else ()
            named = [name for name in ours if name.startswith("export_") and ours[name] and name not in also]
            problems += [f"{name} needs export_interval or export_last" for name in named]
        if not self.prove_load:
            named = [name for name in ours if name.startswith(("allow_", "repair_")) and ours[name]]
            problems += [f"{name} needs prove_load" for name in named]
        if self.export_interval is not None and self.export_interval < 1:
            problems.append(f"export_interval={self.export_interval}: steps are whole numbers from 1 on")
        if self.export_keep is not None and self.export_keep < 1:
            problems.append(f"export_keep={self.export_keep}: at least 1 is kept; None keeps all")
        return problems


def parse(options: Mapping[str, Any], base: CheckpointHooks | None = None) -> CheckpointHooks:
    """Return the options of a mapping, checked; those that it does not name are as in ``base``.

    Raises:
        UsageError: one is not known, has another type, or they contradict each other. Names all.
    """
    known = [field.name for field in fields(CheckpointHooks)]
    if unknown := [name for name in options if name not in known]:
        meant = {name: difflib.get_close_matches(name, known, 1) for name in unknown}
        guesses = "".join(f"\n{close[0]} is the nearest to {name}." for name, close in meant.items() if close)
        lines = "\n  ".join([f"there is no option {', '.join(unknown)}. There are:", *known])
        raise UsageError(f"checkpoint_hooks: {lines}{guesses}")
    parsed = dataclasses.replace(base or CheckpointHooks(), **options)
    parsed.check()
    return parsed


def _fits(value: object, hint: Any) -> bool:
    """Whether a value is of a type, as written in the fields above. A whole number does for a float."""
    if get_origin(hint) in (Union, types.UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is tuple:  # JSON and TOML have lists
        return isinstance(value, list | tuple) and all(_fits(item, get_args(hint)[0]) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def name_of(hint: Any) -> str:
    """Return a type in words."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(map(name_of, get_args(hint)))
    if get_origin(hint) is Literal:
        return " or ".join(f'"{value}"' for value in get_args(hint))
    if get_origin(hint) is tuple:
        return f"list of {name_of(get_args(hint)[0])}"
    return "None" if hint is type(None) else str(hint.__name__)
