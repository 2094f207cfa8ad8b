"""TorchTitan 0.2: the table ``[checkpoint_hooks]`` of a job's TOML. For ``job.custom_config_module``."""

import sys
from dataclasses import dataclass, field

from shardsmith.errors import UsageError

from .options import CheckpointHooks

_TRAINER = f"{__package__}.trainer_0_2"


@dataclass(kw_only=True, slots=True)
class Table(CheckpointHooks):
    """The options, which are of no use to a trainer that does not look at them."""

    def __post_init__(self) -> None:
        """Raise UsageError if something is to be attached, and TorchTitan's own trainer is what was started."""
        if not self.is_idle and _TRAINER not in sys.modules:
            raise UsageError(
                "the job has [checkpoint_hooks], which torchtitan.train does not look at: nothing would be attached. "
                f"Start the job with -m {__package__} instead"
            )


@dataclass
class JobConfig:  # TorchTitan wants types in its annotations, not the names of types
    """Merged into TorchTitan's by its ``ConfigManager``. A JobConfig of your own may derive from this one."""

    checkpoint_hooks: Table = field(default_factory=Table)
    """Checkpoint hooks of Shardsmith."""
