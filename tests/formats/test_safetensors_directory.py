from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from shardsmith.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    IncompleteCheckpointError,
    UnsafeCheckpointError,
    UsageError,
)
from shardsmith.formats.safetensors_files.source import SafetensorsSource, open_safetensors_directory
from shardsmith.tensors.tensors import Chunk, TensorSource, read_tensor

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
HONEST = {"a": ONE, "b": ONE, "c": TWO}


def make_shards(directory: Path, weight_map: object = HONEST) -> Path:
    """Two shards, which hold a and b, and c; and an index, which says whatever it is told to."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file({"a": torch.zeros(2), "b": torch.ones(3)}, directory / ONE, {"format": "pt"})
    save_file({"c": torch.full((2, 2), 2.0)}, directory / TWO, {"format": "pt"})
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 36.0}, "weight_map": weight_map}))
    return directory


def test_it_is_a_tensor_source(tmp_path: Path) -> None:
    source: TensorSource = open_safetensors_directory(make_shards(tmp_path))
    assert source.path == tmp_path
    assert list(source.specs) == ["a", "b", "c"]
    assert torch.equal(read_tensor(source, "c"), torch.full((2, 2), 2.0))


def test_a_missing_file_or_tensor_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError):
        SafetensorsSource(tmp_path / "x.safetensors")
    source = open_safetensors_directory(make_shards(tmp_path))
    with pytest.raises(CheckpointNotFoundError, match="no tensor named 'd'"):
        list(source.pieces("d", Chunk((0,), (1,))))


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "directory"])
def test_what_is_no_regular_file_is_not_read(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "model.safetensors")
    with pytest.raises(UnsafeCheckpointError, match="regular file"):
        open_safetensors_directory(tmp_path)


def test_a_single_file_comes_before_an_index(tmp_path: Path) -> None:
    make_shards(tmp_path)
    save_file({"d": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert list(open_safetensors_directory(tmp_path).specs) == ["d"]


def test_the_stem_is_found_where_there_is_only_one(tmp_path: Path) -> None:
    save_file({"d": torch.zeros(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    assert list(open_safetensors_directory(tmp_path).specs) == ["d"]
    save_file({"e": torch.zeros(1)}, tmp_path / "ema.safetensors")
    assert list(open_safetensors_directory(tmp_path, stem="ema").specs) == ["e"]
    with pytest.raises(UsageError, match=r"diffusion_pytorch_model, ema"):
        open_safetensors_directory(tmp_path)


@pytest.mark.parametrize("name", ["", "missing"])
def test_a_directory_without_weights_is_said_to_have_none(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError):
        open_safetensors_directory(tmp_path / name)


def test_all_missing_shards_are_named_before_any_is_read(tmp_path: Path) -> None:
    make_shards(tmp_path, {"a": "x.safetensors", "b": "z.safetensors", "c": "y.safetensors"})
    (tmp_path / ONE).rename(tmp_path / "z.safetensors").write_bytes(b"")
    with pytest.raises(IncompleteCheckpointError, match=r"2 of 3 weight files are missing\n  'x.*'\n  'y.*'"):
        open_safetensors_directory(tmp_path)


@pytest.mark.parametrize("shard", [ONE, TWO])
def test_a_truncated_shard_is_named(shard: str, tmp_path: Path) -> None:
    path = make_shards(tmp_path) / shard
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(IncompleteCheckpointError, match=shard):
        open_safetensors_directory(tmp_path)


OUTSIDE = [
    "../x.safetensors",
    "../../etc/x.safetensors",
    "/etc/x.safetensors",
    "//host/x.safetensors",
    "./x.safetensors",
    "sub/x.safetensors",
    "sub/../x.safetensors",
    "C:\\x.safetensors",
    "C:x.safetensors",
    "..\\x.safetensors",
    "\\\\host\\x.safetensors",
    "file:x.safetensors",
    "https://host/x.safetensors",
    "x.bin",
    "x.safetensors.bin",
    "x.SAFETENSORS",
    "x.safetensors\n",
    "x\0.safetensors",
    "\ud800.safetensors",
    ".safetensors",
    "x",
    ".",
    "..",
    "",
]


@pytest.mark.parametrize("name", OUTSIDE, ids=ascii)
def test_an_index_that_points_elsewhere_is_refused_before_any_shard_is_read(name: str, tmp_path: Path) -> None:
    directory = make_shards(tmp_path / "model", HONEST | {"d": name})
    for path in (tmp_path / "x.safetensors", directory / ONE):
        path.write_bytes(b"must not be read")
    with pytest.raises(UnsafeCheckpointError, match="beside it; nothing was read"):
        open_safetensors_directory(directory)


CORRUPT: dict[str, Any] = {
    "empty": b"",
    "spaces": b"  ",
    "not JSON": b"{",
    "two documents": b"{}{}",
    "not UTF-8": b'{"weight_map": {"\xff": "x.safetensors"}}',
    "UTF-16": json.dumps({"weight_map": HONEST}).encode("utf-16"),
    "depth bomb": b'{"weight_map": ' + b"[" * 500_000,
    "number of 5000 digits": b'{"metadata": ' + b"9" * 5000 + b"}",
    "a list": b"[]",
    "null": b"null",
    "no weight_map": b'{"metadata": {}}',
    "weight_map twice": json.dumps({"weight_map": HONEST}).encode().replace(b"{", b'{"weight_map": {}, ', 1),
    "name twice": json.dumps({"weight_map": HONEST}).encode().replace(b'"c"', b'"a"'),
    "weight_map is null": None,
    "weight_map is a list": [ONE, TWO],
    "weight_map is a string": ONE,
    "weight_map is empty": {},
    "file is a number": HONEST | {"c": 1},
    "file is null": HONEST | {"c": None},
    "file is a list": HONEST | {"c": [TWO]},
    "tensor in no file": HONEST | {"d": TWO},
    "tensor left out": {"a": ONE, "c": TWO},
    "file left out": {"a": ONE, "b": ONE},
    "no file but the last": {"c": TWO},
    "tensors in the other file": {"a": TWO, "b": TWO, "c": ONE},
    "name with a surrogate": HONEST | {"\ud800": TWO},
}


@pytest.mark.parametrize("content", CORRUPT.values(), ids=CORRUPT)
def test_an_index_that_is_broken_or_lies_is_refused(content: object, tmp_path: Path) -> None:
    make_shards(tmp_path, content if not isinstance(content, bytes) else HONEST)
    if isinstance(content, bytes):
        (tmp_path / INDEX).write_bytes(content)
    with pytest.raises(CorruptCheckpointError):
        open_safetensors_directory(tmp_path)


def test_all_tensors_on_which_the_index_is_wrong_are_listed(tmp_path: Path) -> None:
    make_shards(tmp_path, {"a": TWO, "c": TWO, "d": ONE})
    with pytest.raises(CorruptCheckpointError) as caught:
        open_safetensors_directory(tmp_path)
    assert str(caught.value).splitlines()[1:] == [
        f"  'a': listed for {TWO}, found in {ONE}",
        f"  'b': listed for None, found in {ONE}",
        f"  'd': listed for {ONE}, found in None",
    ]


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    make_shards(tmp_path)
    save_file({"a": torch.zeros(2), "c": torch.zeros(2, 2)}, tmp_path / TWO)
    with pytest.raises(CorruptCheckpointError, match=f"'a' is in both {ONE} and {TWO}"):
        open_safetensors_directory(tmp_path)


def test_a_huge_index_is_refused_unread(tmp_path: Path) -> None:
    make_shards(tmp_path)
    os.truncate(tmp_path / INDEX, 10**12)
    with pytest.raises(CorruptCheckpointError, match="limit"):
        open_safetensors_directory(tmp_path)


def make_cache(tmp_path: Path, snapshot: str = "snapshots/main") -> Path:
    """The directory of a model in a Hugging Face cache: every file a link to a blob."""
    repo = tmp_path / "hub" / "models--org--name"
    source, directory = make_shards(tmp_path / "source"), repo / snapshot
    directory.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for number, path in enumerate(sorted(source.iterdir())):
        path.rename(repo / "blobs" / f"{number:064x}")
        (directory / path.name).symlink_to(os.path.relpath(repo / "blobs" / f"{number:064x}", directory))
    return directory


@pytest.mark.parametrize("snapshot", ["snapshots/main", "snapshots/main/text_encoder"])
def test_links_into_the_blobs_of_the_same_cached_model_are_followed(snapshot: str, tmp_path: Path) -> None:
    assert list(open_safetensors_directory(make_cache(tmp_path, snapshot)).specs) == ["a", "b", "c"]


def test_a_link_to_the_directory_or_inside_it_is_followed(tmp_path: Path) -> None:
    directory = make_shards(tmp_path / "model")
    (directory / TWO).rename(directory / "blob")
    (directory / TWO).symlink_to("blob")
    (tmp_path / "latest").symlink_to("model")
    assert list(open_safetensors_directory(tmp_path / "latest").specs) == ["a", "b", "c"]


@pytest.mark.parametrize("name", [INDEX, ONE, TWO, "model.safetensors"])
@pytest.mark.parametrize("target", ["../other/x", "/etc/hostname", "../model.safetensors"])
def test_links_out_of_the_directory_are_not_followed(name: str, target: str, tmp_path: Path) -> None:
    directory = make_shards(tmp_path / "model")
    (directory / name).unlink(missing_ok=True)
    (directory / name).symlink_to(target)
    with pytest.raises(UnsafeCheckpointError, match=rf"{name}: links to .*out of its directory"):
        open_safetensors_directory(directory)


@pytest.mark.parametrize("target", ["../../../models--org--other/blobs/x", "../../x", "../other/x"])
def test_links_to_other_parts_of_the_cache_are_not_followed(target: str, tmp_path: Path) -> None:
    directory = make_cache(tmp_path)
    (directory / TWO).unlink()
    (directory / TWO).symlink_to(target)
    with pytest.raises(UnsafeCheckpointError, match=TWO):
        open_safetensors_directory(directory)


def test_a_link_that_leads_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("model.safetensors")
    with pytest.raises(CheckpointError, match="link"):
        open_safetensors_directory(tmp_path)
