"""Shardsmith: the checkpoint layer of a sharded PyTorch training run.

Everything public is here, in ``shardsmith.hooks`` and in ``shardsmith.integrations``; other modules are private and may
change. Names are imported when they are first used, so that the command line starts without importing torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardsmith.compare.findings import Diagnosis, Finding
    from shardsmith.compare.verification import Verification, VerifyOptions
    from shardsmith.compare.verification import verify as verify_checkpoints
    from shardsmith.diagnose.diagnosis import diagnose as diagnose_checkpoint
    from shardsmith.diagnose.questions import Questions
    from shardsmith.errors import (
        CheckpointError,
        CheckpointNotFoundError,
        CorruptCheckpointError,
        IncompleteCheckpointError,
        InitialLoadError,
        MismatchError,
        NotEnoughMemoryError,
        ProtectedPathError,
        RankError,
        RankFailedError,
        RanksDisagreeError,
        RankTimeoutError,
        ShardsmithError,
        StorageError,
        TargetError,
        TargetExistsError,
        UnsafeCheckpointError,
        UnsupportedFormatError,
        UsageError,
        WriteError,
    )
    from shardsmith.export.hub import push_export
    from shardsmith.formats.adopt import adopt
    from shardsmith.formats.by_path import detect_checkpoint_format
    from shardsmith.formats.detected import DetectedFormat
    from shardsmith.formats.opened import OpenedCheckpoint, open_checkpoint
    from shardsmith.ground.commit import remove as remove_checkpoint
    from shardsmith.ground.stores import use_client
    from shardsmith.hf.layout_rules import LayoutRule
    from shardsmith.inspection import Inspection, inspect_checkpoint
    from shardsmith.load.load import load_initial, poison_weights, verify_loaded
    from shardsmith.load.report import InitialLoadReport
    from shardsmith.manager import ShardedCheckpointManager
    from shardsmith.name_maps import Joined, NameMap, Slice
    from shardsmith.name_maps.restored import RestoredModel
    from shardsmith.name_maps.tracing import trace
    from shardsmith.overview import RunOverview, inspect_run, newest_step
    from shardsmith.tensor_listing import ListedTensor, list_tensors

__all__ = [
    "CheckpointError",
    "CheckpointNotFoundError",
    "CorruptCheckpointError",
    "DetectedFormat",
    "Diagnosis",
    "Finding",
    "IncompleteCheckpointError",
    "InitialLoadError",
    "InitialLoadReport",
    "Inspection",
    "Joined",
    "LayoutRule",
    "ListedTensor",
    "MismatchError",
    "NameMap",
    "NotEnoughMemoryError",
    "OpenedCheckpoint",
    "ProtectedPathError",
    "Questions",
    "RankError",
    "RankFailedError",
    "RankTimeoutError",
    "RanksDisagreeError",
    "RestoredModel",
    "RunOverview",
    "ShardedCheckpointManager",
    "ShardsmithError",
    "Slice",
    "StorageError",
    "TargetError",
    "TargetExistsError",
    "UnsafeCheckpointError",
    "UnsupportedFormatError",
    "UsageError",
    "Verification",
    "VerifyOptions",
    "WriteError",
    "__version__",
    "adopt",
    "detect_checkpoint_format",
    "diagnose_checkpoint",
    "inspect_checkpoint",
    "inspect_run",
    "list_tensors",
    "load_initial",
    "newest_step",
    "open_checkpoint",
    "poison_weights",
    "push_export",
    "remove_checkpoint",
    "trace",
    "use_client",
    "verify_checkpoints",
    "verify_loaded",
]

__version__ = "0.1.0"

_HOMES = {
    "DetectedFormat": "formats.detected",
    "Diagnosis": "compare.findings",
    "Finding": "compare.findings",
    "InitialLoadReport": "load.report",
    "Inspection": "inspection",
    "Joined": "name_maps",
    "LayoutRule": "hf.layout_rules",
    "ListedTensor": "tensor_listing",
    "NameMap": "name_maps",
    "OpenedCheckpoint": "formats.opened",
    "Questions": "diagnose.questions",
    "RestoredModel": "name_maps.restored",
    "RunOverview": "overview",
    "ShardedCheckpointManager": "manager",
    "Slice": "name_maps",
    "Verification": "compare.verification",
    "VerifyOptions": "compare.verification",
    "adopt": "formats.adopt",
    "detect_checkpoint_format": "formats.by_path",
    "diagnose_checkpoint": "diagnose.diagnosis:diagnose",
    "inspect_checkpoint": "inspection",
    "inspect_run": "overview",
    "list_tensors": "tensor_listing",
    "load_initial": "load.load",
    "newest_step": "overview",
    "open_checkpoint": "formats.opened",
    "poison_weights": "load.load",
    "push_export": "export.hub",
    "remove_checkpoint": "ground.commit:remove",
    "trace": "name_maps.tracing",
    "use_client": "ground.stores",
    "verify_checkpoints": "compare.verification:verify",
    "verify_loaded": "load.load:verify_loaded",
}
"""Public name -> the module that defines it, with the name there where it is another. Errors are all in ``errors``."""


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, original = _HOMES.get(name, "errors").partition(":")
    found = getattr(importlib.import_module(f"{__name__}.{module}"), original or name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
