"""Checkpoints of DeepSpeed, whose shards are not read: they are told by their names, and what makes weights of them.

checkpoint/
    latest  zero_to_fp32.py
    global_step10/
        zero_pp_rank_0_mp_rank_00_model_states.pt ...    ZeRO 3; else mp_rank_00_model_states.pt, which is read
        zero_pp_rank_0_mp_rank_00_optim_states.pt ...    behind bf16_ or fp16_, for one
"""

from __future__ import annotations

import os
import shlex
from fnmatch import fnmatchcase
from pathlib import Path

_OF_A_RANK = ("*_optim_states.pt", "zero_pp_rank_*_model_states.pt")
_OF_A_STEP = (*_OF_A_RANK, "mp_rank_*_model_states.pt")
_PROGRAM = "zero_to_fp32.py"


def why_no_weights(path: Path) -> str | None:
    """Return what to do about a folder or file of such a checkpoint; None for anything else, and for what is read."""
    if path.is_file():
        return _advice(path.parent.parent, path.parent) if _like(path.name, _OF_A_RANK) else None
    names = os.listdir(path)
    if any(_like(name, _OF_A_STEP) for name in names):
        return _advice(path.parent, path)
    steps = (path / name for name in names if name.startswith("global_step"))
    if _PROGRAM in names or any(_like(name, _OF_A_STEP) for one in steps if one.is_dir() for name in os.listdir(one)):
        return _advice(path)
    return None


def _advice(folder: Path, step: Path | None = None) -> str:
    # DeepSpeed puts its program beside the steps, so that it fits the version that wrote them.
    has_program = (folder / _PROGRAM).is_file()
    program = ["python", str(folder / _PROGRAM)] if has_program else ["python", "-m", "deepspeed.utils.zero_to_fp32"]
    tag = [] if step is None else ["-t", step.name]
    command = shlex.join([*program, str(folder), "WEIGHTS", *tag])
    return f"of a checkpoint of DeepSpeed, whose shards are not read; {command} writes whole weights into WEIGHTS"


def _like(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
