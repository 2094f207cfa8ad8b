"""DCP directories written by torch itself, in this process."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata


def save(state_dict: dict[str, Any], directory: Path) -> Path:
    """``dcp.save`` without its warning that there is only one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(state_dict, checkpoint_id=directory)
    return directory


def load(state_dict: dict[str, Any], directory: Path) -> dict[str, Any]:
    """``dcp.load`` without the same."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(state_dict, checkpoint_id=directory)
    return state_dict


def edit_index(directory: Path, edit: Callable[[Metadata], object]) -> None:
    """Change what the index of a directory says."""
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    edit(metadata)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
