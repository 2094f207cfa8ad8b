"""Options that several commands take, and the names that options had before."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from shardsmith.export.plan import ExportOptions
    from shardsmith.hf.layout_rules import LayoutRule

Imports = Annotated[tuple[str, ...], tyro.conf.arg(name="import")]
"""Python modules to import first."""

Dtype = Literal["bfloat16", "float16", "float32", "original"]
"""Dtype of floating-point tensors; "original" keeps the dtype of each."""

FORMER_NAMES = {
    "to-hf": {"--checkpoint-dir": "--checkpoint", "--base-model-path": "--base-model"},
    "to-dcp": {"--model": "--base-model", "--checkpoint": "--output-dir"},
    "watch": {"--base-model-path": "--base-model"},
    "diagnose": {"--model": "--base-model"},
    "verify": {"--model": "--base-model"},
}
"""By command: former name of an option, which is still accepted -> its name. Underscores count as dashes."""

FORMER_VALUES = {"diagnose": {"--trained": {"True": "--trained", "False": "--no-trained", "None": None}}}
"""By command and option, which is a flag today: a value that it took formerly -> the flag; None: as if not given."""


def with_present_names(command: str, arguments: Sequence[str]) -> list[str]:
    """Replace former spellings of options by present ones."""
    former = FORMER_NAMES.get(command, {})
    found = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        # Options are accepted with underscores as well, so they are compared with dashes.
        known = former.get(name.replace("_", "-"))
        found.append(argument if known is None else f"{known}{equals}{value}")
    return _without_former_values(FORMER_VALUES.get(command, {}), found)


def _without_former_values(former: Mapping[str, Mapping[str, str | None]], arguments: Sequence[str]) -> list[str]:
    found: list[str | None] = []
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if equals and value in former.get(option, ()):
            found.append(former[option][value])
        # The value may be a word of its own, behind the option: then both words become one.
        elif found and (last := found[-1]) is not None and argument in former.get(last, ()):
            found[-1] = former[last][argument]
        else:
            found.append(argument)
    return [argument for argument in found if argument is not None]


@dataclass(frozen=True, kw_only=True)
class NameArguments:
    """How tensors of a checkpoint correspond to tensors of the model."""

    names: str = "auto"
    """Name map between the checkpoint and the model.
    "auto": no map if the names are equal, otherwise "transformers".
    "identity": no map.
    "transformers": the names that save_pretrained of transformers writes for this model.
    Or the name of a map that an installed package offers."""
    titan_model: str | None = None
    """For checkpoints of TorchTitan's own models: the model, such as llama3. Needs TorchTitan."""
    titan_flavor: str | None = None
    """Flavor of that model, such as 8B."""
    rules: Path | None = None
    """TOML or JSON file of layout rules, for tensors that have another shape in the model:
    [[rule]] pattern = "*.patch.weight" transform = "conv2d_to_linear" (or "flatten", "transpose", or steps)."""

    @property
    def name_map(self) -> str:
        """Name of the name map. Raises UsageError if the options contradict each other."""
        return choose_names(self.names, self.titan_model, self.titan_flavor)

    @property
    def layout_rules(self) -> tuple[LayoutRule, ...]:
        """All layout rules. Raises UsageError if the file cannot be used."""
        from shardsmith.hf.layout_rules import find_rules

        return tuple(find_rules(self.rules))


@dataclass(frozen=True, kw_only=True)
class ExportArguments(NameArguments):
    """How to write a Hugging Face directory; the same for ``to-hf`` and ``watch``."""

    models: Literal["main", "ema", "both", "all"] = "all"
    """Models to write. "both" fails if one is missing, "all" takes those that exist."""
    average: str | None = None
    """Name of the average, such as 0.999, or its key, such as model_ema, if the checkpoint has several; "shardsmith
    inspect" lists them."""
    dtype: Dtype = "bfloat16"
    """Dtype of floating-point tensors, but of those that the model's class keeps in float32, as some routers of
    experts; "original" keeps the checkpoint's."""
    dtype_of: tuple[str, ...] = ()
    """Exceptions, by pattern of the written names, such as '*norm*=float32'. The first that matches counts."""
    max_shard_size: str | None = None
    """Write several files with an index if the weights are larger than this, such as 5GB."""
    ema_as: Literal["auto", "file", "directory"] = "auto"
    """Where to write the average.
    "file": ema.safetensors, which no library loads unless asked.
    "directory": model.safetensors of a directory of its own, OUTPUT_DIR-ema if main is written, too.
    "auto": ema.safetensors beside main or where the base model has one, else a directory."""
    allow: tuple[str, ...] = ()
    """Patterns of tensor names that may differ from the base model's, such as 'lm_head.*'."""
    drop: tuple[str, ...] = ()
    """Patterns of tensors of the checkpoint to leave out, such as those of an extra head."""
    adapters: Literal["adapter", "merged"] = "adapter"
    """Of a model with an adapter of peft (LoRA): the adapter alone, for PeftModel.from_pretrained, or the whole model
    with the adapter merged into its weights. Needs peft, and the run's adapter_config.json in the checkpoint's folder
    or in the one above it."""
    trust_remote_code: bool = False
    """Copy all Python files of the base model, not only those that its configs name. They are not run."""
    verify: bool = True
    """Compare the checkpoint's files with their recorded hashes, if there are any, and read back the written files
    before they are published."""

    def options(self) -> ExportOptions:
        """Return them as the export takes them. Raises UsageError."""
        from shardsmith.export.plan import ExportOptions
        from shardsmith.tensors.dtypes import parse_dtypes

        return ExportOptions(
            dtype=parse_dtypes(self.dtype, self.dtype_of),
            max_shard_size=self.max_shard_size,
            trust_remote_code=self.trust_remote_code,
            allow=self.allow,
            drop=self.drop,
            verify=self.verify,
            adapters=self.adapters,
            average=self.average,
            names=self.name_map,
            rules=self.layout_rules,
        )


def checkpoint_of(path: Path, step: int | None) -> Path:
    """Return the checkpoint that is meant: the path, or of a run's folder its newest complete step or a given one.

    Says on stderr which one was taken.

    Raises:
        UsageError: a step is asked for, but the path is no folder of a run.
        CheckpointNotFoundError: the run has no such step, or none that is complete.
    """
    from shardsmith.errors import UsageError
    from shardsmith.ground.torchrun.process import is_other_rank
    from shardsmith.overview import is_run, newest_step

    if not is_run(path):
        # Not ignored: whoever names a step expects just that one.
        if step is not None:
            raise UsageError(f"--step needs the folder of a run; {path} is none")
        return path
    found = newest_step(path, step)
    # Once for all ranks of torchrun, which run the same command.
    if not is_other_rank():
        print(f"{path} is the folder of a run; its checkpoint {found} is taken", file=sys.stderr)
    return found


def import_modules(names: Sequence[str]) -> None:
    """Import the modules that a user names: their code runs, and registers model classes.

    Raises:
        UsageError: one cannot be imported.
    """
    from shardsmith.errors import UsageError

    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever the module does when it is imported
            raise UsageError(f"--import {name}: {type(error).__name__}: {error}") from error


def choose_names(names: str, titan_model: str | None, titan_flavor: str | None) -> str:
    """Return the name map that the options ask for: a TorchTitan model is a choice of its own.

    Raises:
        UsageError: they contradict each other.
    """
    from shardsmith.errors import UsageError

    if titan_model is None and titan_flavor is None:
        return names
    if titan_model is None or titan_flavor is None:
        raise UsageError("--titan-model and --titan-flavor go together, as in --titan-model llama3 --titan-flavor 8B")
    # "torchtitan" with a model named is the same wish in other words.
    if names not in ("auto", "torchtitan"):
        raise UsageError(f"--names {names} and --titan-model {titan_model} exclude each other")
    return f"torchtitan:{titan_model}/{titan_flavor}"
