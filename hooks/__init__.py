"""The hooks that a training loop attaches, and what is needed to write one."""

from shardsmith.ground.process_end import finish
from shardsmith.manifest.retention import Retention
from shardsmith.run_state.rank_states import per_rank

from .background import Background
from .base import Hooks
from .disk_space import low_disk
from .ema import EMA
from .events import Event, json_lines, metrics_to, spans, tensorboard
from .export import HFExport
from .folder_save import FolderSave
from .hook import Hook
from .initial_load import InitialLoad
from .options import ExportFiles, ExportVerification, ExportWeights, ExportWriting, SaveWeights, SaveWriting
from .record import Recorder
from .retention import best, keep_if, latest, multiples_of, newer_than
from .save import ShardedSave
from .schedule import Schedule, at, at_file, at_signal, every, last, minutes

__all__ = [
    "EMA",
    "Background",
    "Event",
    "ExportFiles",
    "ExportVerification",
    "ExportWeights",
    "ExportWriting",
    "FolderSave",
    "HFExport",
    "Hook",
    "Hooks",
    "InitialLoad",
    "Recorder",
    "Retention",
    "SaveWeights",
    "SaveWriting",
    "Schedule",
    "ShardedSave",
    "at",
    "at_file",
    "at_signal",
    "best",
    "every",
    "finish",
    "json_lines",
    "keep_if",
    "last",
    "latest",
    "low_disk",
    "metrics_to",
    "minutes",
    "multiples_of",
    "newer_than",
    "per_rank",
    "spans",
    "tensorboard",
]
