"""TorchTitan 0.2: its trainer, with hooks in its checkpoint manager. Imports TorchTitan."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torchtitan.train
from torchtitan.config import ConfigManager

from shardsmith.errors import UsageError

from .manager import HookedManager
from .options import CheckpointHooks, parse

CONFIG_MODULE = f"{__package__}.job_config"

_CONFIG_FILE = ("--job.config_file", "--job.config-file")
_CUSTOM = ("--job.custom_config_module", "--job.custom-config-module", "--experimental.custom_args_module")


class HookedTrainer(torchtitan.train.Trainer):
    """TorchTitan's trainer; the options come from ``checkpoint_hooks`` in its job config."""

    def __init__(self, job_config: Any) -> None:
        """As TorchTitan's, which makes its checkpoint manager itself, from a class that it looks up in its module."""
        options: Any = getattr(job_config, "checkpoint_hooks", None)
        if not isinstance(options, CheckpointHooks):
            raise UsageError(
                "the job's config has no checkpoint_hooks: let the JobConfig of your job.custom_config_module derive "
                f"from that of {CONFIG_MODULE}"
            )
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
    if not _names_config_module(arguments, toml):
        arguments = [*arguments, f"{_CUSTOM[0]}={CONFIG_MODULE}"]
    # it took the command line when it was imported
    ConfigManager.parse_args.__defaults__ = (list(arguments),)
    torchtitan.train.main(HookedTrainer)


def _read_toml(arguments: Sequence[str]) -> dict[str, Any]:
    """The content of the TOML file that the command line names; empty without one. TorchTitan complains of it."""
    file = _value_of(_CONFIG_FILE, arguments)
    if file is None or not Path(file).is_file():
        return {}
    with Path(file).open("rb") as toml:
        return tomllib.load(toml)


def _names_config_module(arguments: Sequence[str], toml: Mapping[str, Any]) -> bool:
    """Whether the command line or the TOML chooses a config module already."""
    return bool(
        _value_of(_CUSTOM, arguments)
        or toml.get("job", {}).get("custom_config_module")
        or toml.get("experimental", {}).get("custom_args_module")
    )


def _value_of(names: Sequence[str], arguments: Sequence[str]) -> str | None:
    """What follows a flag, as ``--flag=value`` or ``--flag value``."""
    for argument, following in zip(arguments, [*arguments[1:], None], strict=True):
        name, equals, value = argument.partition("=")
        if name in names:
            return value if equals else following
    return None
