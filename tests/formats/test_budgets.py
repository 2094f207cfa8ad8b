"""Small files that would cost much: each is an error of ours, after less than a second of CPU and 256 MB."""

from __future__ import annotations

import io
import os
import pickle
import resource
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shardsmith.diagnose.tokenizers import tokenizer_too_large
from shardsmith.diagnose.training_settings import TrainingSettings
from shardsmith.errors import CheckpointError
from shardsmith.formats.by_path import open_source
from shardsmith.formats.dcp.index import read_index
from shardsmith.formats.torch_files.archive import read_archived_object
from shardsmith.formats.torch_files.files import read_plain_value, read_torch_file, read_torch_object
from shardsmith.ground.mapped import MappedFile
from shardsmith.hf.hf_directory import read_config
from shardsmith.manifest.metadata import read_json, read_metadata

_SAME_HASH = (1 << 61) - 1
UNUSUAL = b"ctorch\nSize\n(tR0"
"""Makes our own reader of state dicts give up, so that torch is asked."""


SIX_GIB = struct.pack("<Q", 6 << 30)[:5]


def one_hash(count: int, before: bytes = b"") -> bytes:
    """A dict whose keys all have one hash."""
    keys = (((i + 1) * _SAME_HASH).to_bytes(11, "little") for i in range(count))
    return b"\x80\x02" + before + b"}(" + b"".join(b"\x8a\x0b" + key + b"N" for key in keys) + b"u."


def repeated(code: bytes, count: int = 4 << 20) -> bytes:
    return b"\x80\x02(" + code * count + b"t."


def nested(depth: int) -> bytes:
    return b"\x80\x02" + b"}U\x01a" * depth + b"N" + b"s" * depth + b"."


PICKLES: dict[str, Callable[[], bytes]] = {
    "one hash": lambda: one_hash(100_000),
    "one hash, behind what torch reads": lambda: one_hash(100_000, UNUSUAL),
    "dicts": lambda: repeated(b"}"),
    "lists": lambda: repeated(b"]"),
    "marks": lambda: b"\x80\x02" + b"(" * (4 << 20) + b".",
    "tuples in tuples": lambda: b"\x80\x02)" + b"\x85" * (4 << 20) + b".",
    "nested": lambda: nested(100_000),
    "a length without content": lambda: b"\x80\x02c__builtin__\nbytearray\n(\x8a\x05" + SIX_GIB + b"tR.",
}


def zipped(state: bytes, *, compressed: bool = False) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as archive:
        for name, content in {"data.pkl": state, "byteorder": b"little", "version": b"3\n"}.items():
            archive.writestr(f"archive/{name}", content)
    return out.getvalue()


def legacy(state: bytes) -> bytes:
    """As torch.save wrote before the zip format."""
    head = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}})
    return b"".join(pickle.dumps(part, 2) for part in head) + state + pickle.dumps([], 2)


def refused_cheaply(read: Callable[[], object]) -> None:
    """CPU time is that of this process, and memory the most that it has ever had resident."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(CheckpointError):
        read()
    assert time.process_time() - started < 15  # it takes less than one; without the budgets, minutes
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10


@pytest.mark.parametrize("kind", [*PICKLES])
def test_pickles_that_make_too_much_are_refused(kind: str, tmp_path: Path) -> None:
    state = PICKLES[kind]()
    for name, content in {"x.bin": zipped(state), "y.bin": legacy(state)}.items():
        (tmp_path / name).write_bytes(content)
        refused_cheaply(lambda path=tmp_path / name: open_source(path))  # type: ignore[misc]
    (tmp_path / ".metadata").write_bytes(state)
    refused_cheaply(lambda: read_index(tmp_path))


def shared(leaf: object, depth: int) -> object:
    for _ in range(depth):
        leaf = [leaf, leaf]
    return leaf


@pytest.mark.parametrize("leaf", [1, {"a": 1}, ()])
def test_values_that_are_shared_make_no_more_than_their_pickle_has_bytes(leaf: object, tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(zipped(pickle.dumps({"param_groups": shared(leaf, 28)}, 2)))
    refused_cheaply(lambda: read_plain_value(path, "param_groups"))
    betas = (0.9, 0.999)
    groups = [{"lr": 1e-3, "betas": betas, "params": [i]} for i in range(50)]
    torch.save({"param_groups": groups}, path)
    assert read_plain_value(path, "param_groups") == groups


def test_a_compressed_archive_is_refused_wherever_it_lies(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(zipped(b"\x80\x02" + b"N0" * (100 << 20) + b"}.", compressed=True))
    file = MappedFile(path)
    for read in (lambda: read_torch_file(path), lambda: read_torch_object(path)):
        refused_cheaply(read)
    refused_cheaply(lambda: read_archived_object(file, 0, file.size))


@pytest.mark.parametrize("repeated_text", ["[],", "{},", "["])
def test_json_that_makes_too_much_is_refused(repeated_text: str, tmp_path: Path) -> None:
    text = ('{"a": [' + (repeated_text * (8 << 20)).rstrip(",") + "]}").encode()
    (tmp_path / "metadata.json").write_bytes(text)
    refused_cheaply(lambda: read_metadata(tmp_path))
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    refused_cheaply(lambda: open_source(tmp_path / "x.safetensors"))
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_bytes(text)
    refused_cheaply(lambda: open_source(folder))


def sparse(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


HOSTILE_TEXTS: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a folder": os.mkdir,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a terabyte of nothing": lambda path: sparse(path, 1 << 40),
    "a little less of nothing": lambda path: sparse(path, 30 << 20),
    "what grows": lambda path: path.symlink_to("/proc/self/status"),  # of 0 bytes, and there are some
    "lists in lists": lambda path: path.write_text('{"a": ' + "[" * 90_000 + "]" * 90_000 + "}"),
    "tables in tables": lambda path: path.write_text("a = " + "[" * 90_000 + "]" * 90_000),
    "ones": lambda path: path.write_bytes(b'{"a": [' + b"1," * (15 << 20) + b"1]}"),
    "lists": lambda path: path.write_bytes(b'{"a": [' + b"[]," * (10 << 20) + b"1]}"),
    "a long number": lambda path: path.write_bytes(b'{"a": ' + b"1" * (30 << 20) + b"}"),
    "a list": lambda path: path.write_text("[]"),
    "half a character": lambda path: path.write_bytes(b'{"a": "\xff"}'),
}
READERS: dict[str, Callable[[Path], object]] = {
    "config.json": read_json,
    "events.toml": TrainingSettings.read,
    "tokenizer.json": lambda path: list(tokenizer_too_large(path.parent, 5)) or read_json(path),
    "metadata.json": lambda path: read_metadata(path.parent),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", HOSTILE_TEXTS)
def test_a_text_of_strangers_costs_little_and_blocks_nothing(kind: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    HOSTILE_TEXTS[kind](path)
    refused_cheaply(lambda: READERS[name](path))


@pytest.mark.parametrize("kind", HOSTILE_TEXTS)
def test_a_base_model_with_such_a_config_is_refused(kind: str, tmp_path: Path) -> None:
    HOSTILE_TEXTS[kind](tmp_path / "config.json")
    refused_cheaply(lambda: read_config(tmp_path))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of torch 2.11
def test_what_torch_saves_is_within_the_budget(tmp_path: Path) -> None:
    state = {f"layers.{i}.weight": torch.ones(1).to_sparse() for i in range(500)}  # which is left to torch
    torch.save({"state": state, "numbers": list(range(100_000)), "large": 1 << 100}, tmp_path / "x.pt")
    assert len(read_torch_object(tmp_path / "x.pt")["numbers"]) == 100_000
