from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import xxhash

from shardsmith.errors import IncompleteCheckpointError
from shardsmith.ground import layout
from shardsmith.ground.commit import sweep
from shardsmith.manifest.checkpoints import (
    committed_steps,
    find_damage,
    hash_file,
    loadable_steps,
    set_aside,
    set_aside_unfinished,
    unreadable_steps,
    why_unreadable,
)
from shardsmith.manifest.metadata import FileRecord, read_metadata
from tests.golden_checkpoint import SHARDED
from tests.unreadable import UNREADABLE

ID = "0123456789abcdef"
FILES = [".metadata", "__0_0.distcp", "__1_0.distcp"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A sound checkpoint that may be spoiled."""
    return shutil.copytree(SHARDED, tmp_path / "step-3")


def add(directory: Path, name: str) -> Path:
    """A directory that holds a metadata.json."""
    shutil.copytree(SHARDED, directory / name)
    return directory / name


def test_committed_steps_are_sorted_by_number(tmp_path: Path) -> None:
    for step in (10, 9, 100, 0):
        add(tmp_path, f"step-{step}")
    assert committed_steps(tmp_path) == [0, 9, 10, 100]


@pytest.mark.parametrize(
    "name",
    [
        "step-007",
        "step-",
        "step--1",
        "step-+1",
        "step-1.5",
        "step-1e3",
        "step-٣",
        "step-3 ",
        "step-3\n",
        "step_3",
        "Step-3",
        "old-step-3",
        "step-3.bak",
        "step-9999999999999999999",
        f".step-3.tmp-{ID}",
        f".step-3.trash-{ID}",
        f".step-3.damaged-{ID}",
        "hf-export-step-3",
        "3",
    ],
)
def test_a_directory_of_another_name_is_no_step(tmp_path: Path, name: str) -> None:
    add(tmp_path, name)
    assert committed_steps(tmp_path) == []


def test_a_step_counts_only_with_our_file_in_it(tmp_path: Path) -> None:
    (tmp_path / "step-1").mkdir()
    (tmp_path / "step-2").touch()
    (tmp_path / "step-3" / layout.METADATA_FILE).mkdir(parents=True)
    (tmp_path / "step-4").mkdir()
    os.mkfifo(tmp_path / "step-4" / layout.METADATA_FILE)
    (tmp_path / "step-5").symlink_to("nowhere")
    (tmp_path / "step-6").mkdir()
    (tmp_path / "step-6" / layout.METADATA_FILE).symlink_to("nowhere")
    add(tmp_path, "step-7")
    assert committed_steps(tmp_path) == [7]


def test_an_absent_directory_or_a_file_has_no_steps(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert committed_steps(tmp_path / "absent") == committed_steps(tmp_path / "file") == []


def test_a_sound_checkpoint_has_no_damage(checkpoint: Path) -> None:
    assert find_damage(checkpoint) == find_damage(checkpoint, contents=False) == []


def swap_for_link(path: Path) -> None:
    path.rename(path.with_name("moved"))
    path.symlink_to("moved")


def swap_for_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def swap_for_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "deleted": (Path.unlink, "cannot be read: No such file or directory"),
    "emptied": (lambda path: os.truncate(path, 0), "has 0 bytes, expected "),
    "one byte shorter": (lambda path: os.truncate(path, path.stat().st_size - 1), " bytes, expected "),
    "one byte longer": (lambda path: path.write_bytes(path.read_bytes() + b"\0"), " bytes, expected "),
    "a link to itself elsewhere": (swap_for_link, "is not a regular file (lrwx"),
    "a FIFO": (swap_for_fifo, "is not a regular file (prw"),
    "a directory": (swap_for_directory, "is not a regular file (drwx"),
}


@pytest.mark.parametrize("contents", [True, False], ids=["contents", "sizes"])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", DAMAGE)
def test_each_file_that_is_not_what_was_written_is_named(
    checkpoint: Path, kind: str, name: str, contents: bool
) -> None:
    damage, text = DAMAGE[kind]
    damage(checkpoint / name)
    (found,) = find_damage(checkpoint, contents=contents)
    assert found.startswith(f"{name}: ")
    assert text in found


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_found_by_the_contents(checkpoint: Path, name: str) -> None:
    sound = (checkpoint / name).read_bytes()
    for position in [0, len(sound) - 1, *range(0, len(sound), 97)]:
        flipped = bytearray(sound)
        flipped[position] ^= 1 << position % 8
        (checkpoint / name).write_bytes(flipped)
        (found,) = find_damage(checkpoint)
        assert found.startswith(f"{name}: has changed since it was written: XXH3-128 ")
    assert find_damage(checkpoint, contents=False) == []


def test_a_file_of_another_step_of_equal_size_is_found(checkpoint: Path) -> None:
    shard = checkpoint / "__1_0.distcp"
    other = bytes(reversed(shard.read_bytes()))
    shard.write_bytes(other)
    (found,) = find_damage(checkpoint)
    assert xxhash.xxh3_128_hexdigest(other) in found


@pytest.mark.parametrize("kind", ["deleted", "emptied", "one byte longer", "a FIFO", "a directory"])
def test_damage_to_metadata_json_is_found(checkpoint: Path, kind: str) -> None:
    damage, _ = DAMAGE[kind]
    damage(checkpoint / layout.METADATA_FILE)
    (found,) = find_damage(checkpoint)
    assert layout.METADATA_FILE in found


def test_all_damage_is_told(checkpoint: Path) -> None:
    for name in FILES:
        (checkpoint / name).unlink()
    assert [line.split(":")[0] for line in find_damage(checkpoint)] == FILES


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_the_parts_divide_the_work(checkpoint: Path, parts: int) -> None:
    for name in FILES:
        os.truncate(checkpoint / name, 0)
    shares = [find_damage(checkpoint, part=part, parts=parts) for part in range(parts)]
    assert sorted(line for share in shares for line in share) == find_damage(checkpoint)
    assert max(map(len, shares)) == -(-len(FILES) // parts)


@pytest.mark.parametrize("name", ["../step-2/__0_0.distcp", "/etc/passwd", "a/b", "..", ".", "", "a\0b", "\ud800"])
def test_a_name_that_leads_elsewhere_is_damage_and_is_not_opened(checkpoint: Path, name: str) -> None:
    metadata = read_metadata(checkpoint)
    record = FileRecord(size=1, xxh3_128="0" * 32)
    (checkpoint / layout.METADATA_FILE).write_bytes(replace(metadata, files={name: record}).to_json())
    assert len(find_damage(checkpoint)) == 1


def test_a_checkpoint_that_is_set_aside_counts_no_more_and_its_step_is_free(tmp_path: Path, checkpoint: Path) -> None:
    add(tmp_path, "step-2")
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    aside = set_aside(checkpoint)
    assert aside.parent == tmp_path
    assert committed_steps(tmp_path) == [2]
    assert not checkpoint.exists()
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == before
    assert sweep(tmp_path) == []  # a person may want to look at it


def test_a_step_can_be_set_aside_twice(tmp_path: Path, checkpoint: Path) -> None:
    first = set_aside(checkpoint)
    assert set_aside(add(tmp_path, "step-3")) != first


@pytest.mark.parametrize("size", [0, 1, (8 << 20) - 1, (8 << 20) + 1])
def test_the_hash_is_that_of_the_bytes(tmp_path: Path, size: int) -> None:
    data = bytes(range(256)) * (size // 256 + 1)
    (tmp_path / "file").write_bytes(data[:size])
    assert hash_file(tmp_path / "file") == xxhash.xxh3_128_hexdigest(data[:size])


def test_the_hash_does_not_follow_links(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("file")
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        hash_file(tmp_path / "link")


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_is_no_directory_is_no_checkpoint_and_does_not_stop_a_search(
    tmp_path: Path, checkpoint: Path, kind: str
) -> None:
    put, reason = UNREADABLE[kind]
    step = tmp_path / "step-9"
    put(step)
    assert why_unreadable(step) == reason
    assert committed_steps(tmp_path) == [3]
    assert loadable_steps(tmp_path) == [3]
    ((aside, why),) = set_aside_unfinished(tmp_path, newest=3).items()
    assert (aside.name.split("-")[0:2], why) == ([".step", "9.damaged"], reason)
    assert not os.path.lexists(step)
    assert os.path.lexists(aside)  # nothing is deleted
    assert sweep(tmp_path) == []
    assert checkpoint.is_dir()


@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_run_does_not_begin_anew_beside_steps_that_cannot_be_read(tmp_path: Path, kind: str) -> None:
    put, reason = UNREADABLE[kind]
    put(tmp_path / "step-9")
    with pytest.raises(IncompleteCheckpointError, match=f"holds no checkpoint that can be read\n  step-9 {reason}"):
        loadable_steps(tmp_path)
    assert os.path.lexists(tmp_path / "step-9")


def test_a_directory_that_may_not_be_read_or_not_be_entered_is_unreadable() -> None:
    with tempfile.TemporaryDirectory() as root, as_nobody(Path(root)):
        for mode in (0o000, 0o444, 0o111, 0o755):
            step = Path(root, f"step-{mode}")
            step.mkdir()
            step.chmod(mode)
            assert why_unreadable(step) == (None if mode == 0o755 else "cannot be read: Permission denied")
        assert committed_steps(Path(root)) == []
        assert len(unreadable_steps(Path(root))) == 3
        for path in Path(root).iterdir():
            path.chmod(0o755)


@contextlib.contextmanager
def as_nobody(place: Path) -> Iterator[None]:
    """As another user than root, for whom permissions hold, in a directory of that user."""
    user = os.geteuid()
    if user == 0:
        os.chown(place, 65534, -1)
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
