"""Folders with one ``torch.save`` file a rank: verl's, and those of FSDP1 scripts.

    actor/                                             verl
        model_world_size_2_rank_0.pt  model_world_size_2_rank_1.pt
        optim_world_size_2_rank_0.pt ...  extra_state_world_size_2_rank_0.pt ...
        huggingface/                                   config and tokenizer
    checkpoint/                                        scripts, and accelerate with LOCAL_STATE_DICT
        model.rank_0.pth ...  or  pytorch_model_fsdp_0_rank0.bin ...

What the files hold decides: DTensors and ShardedTensors say where they belong and are put together; flat parameters
and bare local parts do not, and are refused with what to do.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shardsmith.errors import CheckpointError, UnsafeCheckpointError, UnsupportedFormatError
from shardsmith.formats.detected import INCOMPLETE, RANK_FILES, UNKNOWN, DetectedFormat, FormatReader, reason_of
from shardsmith.formats.models import ModelSource
from shardsmith.formats.torch_files.source import open_rank_files, rank_files_models
from shardsmith.tensors.checkpoint_keys import MAIN

_NAME = re.compile(
    r"(?P<stem>.*?)([._-]?world_size_?(?P<size>[1-9][0-9]{0,5}))?[._-]?rank[._-]?(?P<rank>[0-9]{1,6})"
    r"([._-]of[._-](?P<of>[1-9][0-9]{0,5}))?(?P<suffix>\.(pt|pth|bin|ckpt))"
)
_BESIDE = re.compile(r"(optim|extra_state|scheduler|rng|random|sampler|data|trainer)", re.IGNORECASE)
_MODEL = re.compile(r"((pytorch_)?model|weights)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class _Save:
    """The files of one save, in the order of the ranks."""

    names: tuple[str, ...]
    missing: tuple[int, ...]
    """Ranks without a file."""
    world_size: int


def detect_rank_files(path: Path) -> DetectedFormat | None:
    """Detect a folder with files of ranks; incomplete where some ranks have none, or files of two saves are mixed."""
    saves = _saves(path)
    if not saves:
        return None
    if len(saves) > 1:
        mixed = " and ".join(f"{save.names[0]} (of {save.world_size} ranks)" for save in saves)
        return DetectedFormat(INCOMPLETE, f"files of several saves are mixed: {mixed}; keep those of one")
    (save,) = saves
    if save.missing:
        there = f"{len(save.names)} of {save.world_size} files of ranks"
        return DetectedFormat(INCOMPLETE, f"{there}, {save.names[0]} first; missing: ranks {_listed(save.missing)}")
    try:
        models = rank_files_models(path, save.names)
    except (UnsafeCheckpointError, UnsupportedFormatError) as error:
        return DetectedFormat(UNKNOWN, f"cannot be read: {reason_of(error, path)}")
    except CheckpointError as error:
        return DetectedFormat(INCOMPLETE, reason_of(error, path))
    there = f"{save.names[0]} and so on, files of {save.world_size} ranks"
    return DetectedFormat(RANK_FILES, f"{there}, with {', '.join(models) or 'no'} weights")


def _saves(path: Path) -> list[_Save]:
    """List the saves of models whose files lie in a folder: where some are called a model, only these."""
    groups: dict[tuple[str, str, str], dict[int, str]] = {}
    for name in sorted(os.listdir(path)):
        match = _NAME.fullmatch(name)
        if match and not _BESIDE.match(match["stem"]):
            # Files of one save agree in all but the rank: what differs in the world size is of another save.
            key = (match["stem"], match["size"] or match["of"] or "", match["suffix"])
            groups.setdefault(key, {})[int(match["rank"])] = name
    called = {key: ranks for key, ranks in groups.items() if _MODEL.match(key[0])}
    groups = called or groups
    # Without a size in the names, missing ranks at the end cannot be seen here; the shards' boxes then show the hole.
    return [_save(ranks, int(size) if size else max(ranks) + 1) for (_, size, _), ranks in groups.items()]


def _save(ranks: dict[int, str], world_size: int) -> _Save:
    names = tuple(ranks[rank] for rank in sorted(ranks))
    return _Save(names, tuple(rank for rank in range(world_size) if rank not in ranks), world_size)


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")


def _models(path: Path) -> list[str]:
    return rank_files_models(path, _saves(path)[0].names)


def _open(path: Path, model: str = MAIN) -> ModelSource:
    return open_rank_files(path, _saves(path)[0].names, model)


RANK_FILES_READER = FormatReader.by_path(detect_rank_files, _models, _open)
