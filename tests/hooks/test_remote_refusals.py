"""What cannot be done in an object store is refused by name when it is asked for, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from shardsmith import UsageError
from shardsmith.formats.adopt import adopt
from shardsmith.ground import object_store
from shardsmith.hooks import FolderSave, Recorder, ShardedSave, every, json_lines, low_disk
from shardsmith.manifest.trainer_folders import last_checkpoint

PLACE = "s3://bucket/run"


def save(**options: Any) -> object:
    return ShardedSave(PLACE, model=nn.Linear(2, 2), when=every(1), **options)


def folder_save() -> FolderSave:
    return FolderSave(nn.Linear(2, 2), async_mode="disabled")


REFUSED: dict[str, tuple[str, Callable[[], object]]] = {
    "one write": ('ShardedSave: weights="huggingface"', lambda: save(weights="huggingface")),
    "one write, with a cache": (
        'ShardedSave: weights="huggingface"',
        lambda: save(weights="huggingface", local_cache="cache"),
    ),
    "a link": ("ShardedSave: latest_link=True", lambda: save(latest_link=True)),
    "free space": (r"keep=low_disk\(", lambda: save(keep=low_disk("1GB"))),
    "a cache elsewhere": ("ShardedSave: local_cache=", lambda: save(local_cache="s3://other/run")),
    "Recorder": ("Recorder: directory=", lambda: Recorder(PLACE, model=nn.Linear(2, 2))),
    "FolderSave": (r"FolderSave\.save: folder=", lambda: folder_save().save(1, PLACE)),  # type: ignore[arg-type]
    "FolderSave before": (r"FolderSave\.before_save: folder=", lambda: folder_save().before_save(PLACE)),  # type: ignore[arg-type]
    "FolderSave back": (r"FolderSave\.load: folder=", lambda: folder_save().load(PLACE)),  # type: ignore[arg-type]
    "events": ("json_lines: path=", lambda: json_lines(f"{PLACE}/events.jsonl")),
    "folders of Trainer": ("last_checkpoint: parent=", lambda: last_checkpoint(PLACE)),
    "adopt": ("adopt: directory=", lambda: adopt(PLACE, step=1)),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("feature", REFUSED)
def test_the_feature_is_named_and_nothing_is_written(
    feature: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(object_store, "_clients", {})
    named, ask = REFUSED[feature]
    with pytest.raises(UsageError, match=rf"(?s)^{named}.*(leave it out|s3:// is not supported here)"):
        ask()
    assert object_store._clients == {}, "the store was not asked"
    assert [*tmp_path.iterdir()] == []
