"""TorchTitan 0.2: its trainer, with hooks in its checkpoint manager. Imports TorchTitan."""

import functools
import importlib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torchtitan.train
from torchtitan.config import ConfigManager, JobConfig

from .job_config import Table
from .manager import HookedManager
from .options import parse

_CONFIG_FILE = ("--job.config_file", "--job.config-file")
_CUSTOM = ("--job.custom_config_module", "--job.custom-config-module")


@dataclass
class HookedJobConfig(JobConfig):
    """TorchTitan's, with our table; a ``job.custom_config_module`` is merged into it as into TorchTitan's."""

    checkpoint_hooks: Table = field(default_factory=Table)
    """Checkpoint hooks of Shardsmith."""


class HookedTrainer(torchtitan.train.Trainer):
    """TorchTitan's trainer; the options come from ``checkpoint_hooks`` in its job config."""

    def __init__(self, job_config: Any) -> None:
        """As TorchTitan's, which makes its checkpoint manager itself, from a class that it looks up in its module."""
        options = job_config.checkpoint_hooks
        options.check()

        class Manager(HookedManager):
            def __init__(self, **parts: Any) -> None:
                super().__init__(**parts)
                self.attach(options, parts["checkpoint_config"], parts)

        original = torchtitan.train.CheckpointManager
        torchtitan.train.CheckpointManager = Manager
        try:
            super().__init__(job_config)
        finally:
            torchtitan.train.CheckpointManager = original


def train(arguments: Sequence[str]) -> None:
    """What ``torchtitan.train`` does with a command line. The table needs no ``job.custom_config_module`` here."""
    toml = _read_toml(arguments)
    parse(toml.get("checkpoint_hooks", {}))  # TorchTitan would not say what there is
    ConfigManager.parse_args.__defaults__ = (list(arguments),)  # it took the command line when it was imported
    original = torchtitan.train.ConfigManager
    # The job's own module may have the table already.
    if not _has_table(_config_module(arguments, toml)):
        torchtitan.train.ConfigManager = functools.partial(ConfigManager, HookedJobConfig)
    try:
        torchtitan.train.main(HookedTrainer)
    finally:
        torchtitan.train.ConfigManager = original


def _read_toml(arguments: Sequence[str]) -> dict[str, Any]:
    """The content of the TOML file that the command line names; empty without one. TorchTitan complains of it."""
    file = _value_of(_CONFIG_FILE, arguments)
    if file is None or not Path(file).is_file():
        return {}
    with Path(file).open("rb") as toml:
        return tomllib.load(toml)


def _config_module(arguments: Sequence[str], toml: Mapping[str, Any]) -> str | None:
    """The module that the job extends TorchTitan's config with."""
    named: str | None = _value_of(_CUSTOM, arguments) or toml.get("job", {}).get("custom_config_module")
    return named


def _has_table(module: str | None) -> bool:
    """Whether the job's own extension of the config has our table already."""
    if module is None:
        return False
    return any(field.name == "checkpoint_hooks" for field in fields(importlib.import_module(module).JobConfig))


def _value_of(names: Sequence[str], arguments: Sequence[str]) -> str | None:
    """What follows a flag, as ``--flag=value`` or ``--flag value``."""
    for argument, following in zip(arguments, [*arguments[1:], None], strict=True):
        name, equals, value = argument.partition("=")
        if name in names:
            return value if equals else following
    return None
