from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from shardsmith.errors import CheckpointError, CheckpointNotFoundError, CorruptCheckpointError, UnsupportedFormatError
from shardsmith.formats.dcp.source import DcpSource
from shardsmith.ground.layout import METADATA_FILE
from shardsmith.manifest.checkpoints import find_damage
from shardsmith.manifest.initial import BufferRecord, InitialRecord, config_hash
from shardsmith.manifest.metadata import (
    SCHEMA_VERSION,
    CheckpointMetadata,
    FileRecord,
    ModelRecord,
    TensorRecord,
    has_manifest,
    now,
    read_json,
    read_metadata,
)
from shardsmith.manifest.seal import SEAL
from shardsmith.tensors.checkpoint_keys import find_models
from shardsmith.tensors.digest import digest_tensor
from shardsmith.tensors.tensors import TensorSpec, read_tensor
from tests.golden_checkpoint import GOLDEN, SHARDED, SPECS, golden_tensors, patterned
from tests.tensor_cases import DTYPES, raw_bytes

FULL = CheckpointMetadata(
    attempt="0123456789abcdef",
    step=3000,
    created_at="2026-01-02T03:04:05+00:00",
    models=("main", "ema"),
    counts={
        "main": ModelRecord(tensors=2, elements=13, dtypes={"bfloat16": 12, "int64": 1}),
        "ema": ModelRecord(tensors=1, elements=12, dtypes={"float32": 12}),
    },
    ema={"decay": 0.999, "warmup": False, "start_step": 10, "every_n_steps": 1, "updates": 2990},
    tied={"lm_head.weight": "embed.weight"},
    world_size=8,
    mesh={"shape": [2, 4], "dim_names": ["dp_replicate", "dp_shard"]},
    files={
        ".metadata": FileRecord(size=993, xxh3_128="00112233445566778899aabbccddeeff"),
        "__0_0.distcp": FileRecord(size=2**40, xxh3_128="ffeeddccbbaa99887766554433221100"),
    },
    tensors={
        "embed.weight": TensorRecord(shape=(3, 4), dtype="bfloat16", digest="0000000000000001000000000000002a"),
        "norm.steps": TensorRecord(shape=(), dtype="int64", digest="00000000000000000000000000000000"),
        "ema_model.embed.weight": TensorRecord(shape=(3, 4), dtype="float32", digest="f" * 32),
    },
    libraries={"shardsmith": "0.1.0", "torch": "2.13.0", "python": "3.11.7"},
)
INITIAL = dataclasses.replace(
    FULL,
    step=0,
    initial=InitialRecord(
        source="allenai/OLMo-2-0425-1B",
        source_format="huggingface",
        names="identity",
        cast_to=None,
        model_class="Olmo2ForCausalLM",
        config={"hidden_size": 4, "rope_parameters": {"rope_theta": 500000.0}},
        config_xxh3_128=config_hash({"hidden_size": 4, "rope_parameters": {"rope_theta": 500000.0}}),
        tokenizer={"tokenizer.json": "00112233445566778899aabbccddeeff"},
        buffers={
            "rotary.inv_freq": BufferRecord.of(torch.tensor([1.0, 0.1, float("nan")])),
            "mask": BufferRecord.of(torch.ones(300, 300, dtype=torch.bool)),
            "nothing": BufferRecord.of(torch.empty(0, 3)),
            "scalar": BufferRecord.of(torch.tensor(2.0, dtype=torch.bfloat16)),
        },
        heads={"future_predictor": ("ln.weight", "ln.bias")},
        seed=0,
    ),
)
"""What a training starts from."""
BARE = dataclasses.replace(
    FULL, models=(), counts={}, ema=None, tied={}, mesh=None, files={}, tensors={}, step=0, world_size=1
)
"""A checkpoint without a model: of an optimizer alone, say."""
NAMED = dataclasses.replace(
    FULL, names={"a.weight": {"source": "embed.weight", "start": [0, 0], "dims": [[[0, 1, 3]], [[1, 1, 4]]]}}
)
"""That says how its tensors are called in Hugging Face files."""


def put(directory: Path, content: bytes | dict[str, Any]) -> Path:
    """Write a metadata.json and return the directory."""
    if not isinstance(content, bytes):
        content.pop(SEAL, None)  # as files that are older than it
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    (directory / METADATA_FILE).write_bytes(data)
    return directory


def content() -> dict[str, Any]:
    """The JSON object of ``FULL``, fit to be changed."""
    parsed: dict[str, Any] = json.loads(FULL.to_json())
    del parsed[SEAL]
    return parsed


@pytest.mark.parametrize("metadata", [FULL, BARE, INITIAL, NAMED], ids=["full", "bare", "initial", "named"])
def test_what_is_written_is_read_back(tmp_path: Path, metadata: CheckpointMetadata) -> None:
    assert read_metadata(put(tmp_path, metadata.to_json())) == metadata


def test_the_golden_file_is_read_and_would_be_written_the_same() -> None:
    assert read_metadata(GOLDEN) == FULL, "which is older than the hash of the file in it"
    written = FULL.to_json()
    assert json.loads(written).pop(SEAL) != "0" * 32
    assert written.startswith((GOLDEN / METADATA_FILE).read_bytes().rstrip().removesuffix(b"\n}"))


def test_every_flipped_bit_and_every_cut_is_found(tmp_path: Path) -> None:
    data = FULL.to_json()
    for bit in range(len(data) * 8):
        broken = bytearray(data)
        broken[bit // 8] ^= 1 << bit % 8
        with pytest.raises((CorruptCheckpointError, UnsupportedFormatError)):
            read_metadata(put(tmp_path, bytes(broken)))
    for length in range(len(data)):
        with pytest.raises(CorruptCheckpointError):
            read_metadata(put(tmp_path, data[:length]))


def test_a_flip_in_what_says_whose_it_is_does_not_make_it_somebody_elses(tmp_path: Path) -> None:
    data = FULL.to_json()
    begin, end = data.index(b'"checkpoint_type"'), data.index(b'"schema_version"') + len(b'"schema_version"')
    for at in range(begin, end):
        broken = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        place = put(tmp_path, broken)
        assert has_manifest(place), broken[begin:end]
        with pytest.raises(CorruptCheckpointError):
            read_metadata(place)


@pytest.mark.parametrize("facts", [{"updates": 3}, {"decay": None}], ids=["without", "null"])
def test_an_average_whose_decay_is_not_said_is_read(tmp_path: Path, facts: dict[str, Any]) -> None:
    assert read_metadata(put(tmp_path, content() | {"ema": facts})).ema == facts


@pytest.mark.parametrize("decay", ["0.9", True, -1, 1.5, [0.9]])
def test_a_decay_that_is_none_is_refused(tmp_path: Path, decay: Any) -> None:
    with pytest.raises(CorruptCheckpointError, match="decay"):
        read_metadata(put(tmp_path, content() | {"ema": {"decay": decay}}))


def test_only_what_training_starts_from_needs_the_newer_schema(tmp_path: Path) -> None:
    assert (FULL.schema_version, INITIAL.schema_version, NAMED.schema_version) == (1, 2, 5)
    old = {**json.loads(INITIAL.to_json()), "schema_version": 1}
    new = {**content(), "schema_version": 2}
    for contradiction in (old, new):
        with pytest.raises(CorruptCheckpointError, match="initial"):
            read_metadata(put(tmp_path, contradiction))


@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_only_names_in_files_need_the_newest_schema(tmp_path: Path, version: int) -> None:
    with pytest.raises(CorruptCheckpointError, match="has no field"):
        read_metadata(put(tmp_path, {**json.loads(NAMED.to_json()), "schema_version": version}))


def test_recorded_buffers_come_back_bit_for_bit() -> None:
    assert INITIAL.initial is not None
    found = {name: record.tensor() for name, record in INITIAL.initial.buffers.items()}
    assert raw_bytes(found["rotary.inv_freq"]) == raw_bytes(torch.tensor([1.0, 0.1, float("nan")]))
    assert found["mask"] is None, "too large, but it has a digest"
    assert (tuple(found["nothing"].shape), found["scalar"].item()) == ((0, 3), 2.0)


def test_the_hash_of_a_config_is_that_of_what_the_model_computes() -> None:
    config = {"a": 1, "b": {"c": [1.5, None]}}
    assert config_hash(config) == config_hash({"b": {"c": [1.5, None]}, "a": 1, "_name_or_path": "/x", "dtype": "f"})
    assert config_hash(config) != config_hash({**config, "a": 2})


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(InitialRecord)])
def test_initial_fields_are_required_and_typed(tmp_path: Path, name: str) -> None:
    parsed: dict[str, Any] = json.loads(INITIAL.to_json())
    for broken in ({}, {name: True}, {name: -1}, {name: [{}]}):
        initial = {key: value for key, value in parsed["initial"].items() if key != name} | broken
        with pytest.raises(CorruptCheckpointError, match="is damaged"):
            read_metadata(put(tmp_path, {**parsed, "initial": initial}))


@pytest.mark.parametrize("values", ["AAAA", "!!!!", "AA", "AAAAAAAAAAAAAAA=", 5, "A" * 17], ids=str)
def test_buffer_values_that_do_not_fit_their_shape_are_refused(tmp_path: Path, values: object) -> None:
    parsed: dict[str, Any] = json.loads(INITIAL.to_json())
    parsed["initial"]["buffers"]["rotary.inv_freq"]["values"] = values
    with pytest.raises(CorruptCheckpointError, match="is damaged"):
        read_metadata(put(tmp_path, parsed))


def test_a_new_one_names_the_libraries_and_the_time_in_utc() -> None:
    fields = {field.name: getattr(FULL, field.name) for field in dataclasses.fields(FULL) if field.name != "libraries"}
    assert CheckpointMetadata(**fields).libraries.keys() == {"shardsmith", "torch", "python"}
    assert now().endswith("+00:00")


def test_what_json_cannot_say_is_not_written() -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        dataclasses.replace(FULL, ema={"decay": float("nan")}).to_json()


def test_a_tensor_record_becomes_a_spec() -> None:
    assert FULL.tensors["embed.weight"].spec("a") == TensorSpec("a", (3, 4), torch.bfloat16)


OPTIONAL = {"ema", "mesh"}
LATER = {"initial", "weights", "names"}  # not in version 1, of which the content is
IN_NO_FILE = {"sealed"}
SAYS_WHAT_IT_IS = (["checkpoint_type"], ["schema_version"])
REQUIRED_PATHS = [
    *([field.name] for field in dataclasses.fields(CheckpointMetadata) if field.name not in LATER | IN_NO_FILE),
    *SAYS_WHAT_IT_IS,
    *(["counts", "ema", field.name] for field in dataclasses.fields(ModelRecord)),
    *(["files", "__0_0.distcp", field.name] for field in dataclasses.fields(FileRecord)),
    *(["tensors", "embed.weight", field.name] for field in dataclasses.fields(TensorRecord)),
    ["counts", "ema"],
]


def parent_of(parsed: dict[str, Any], path: list[str]) -> dict[str, Any]:
    for step in path[:-1]:
        parsed = parsed[step]
    return parsed


@pytest.mark.parametrize("path", REQUIRED_PATHS, ids=".".join)
def test_every_field_is_required(tmp_path: Path, path: list[str]) -> None:
    parsed = content()
    del parent_of(parsed, path)[path[-1]]
    kind = UnsupportedFormatError if path in SAYS_WHAT_IT_IS else CorruptCheckpointError
    with pytest.raises(kind, match=METADATA_FILE):
        read_metadata(put(tmp_path, parsed))


@pytest.mark.parametrize(
    "path", [[], ["counts", "ema"], ["files", ".metadata"], ["tensors", "norm.steps"]], ids=".".join
)
def test_an_unknown_field_is_refused(tmp_path: Path, path: list[str]) -> None:
    parsed = content()
    parent_of(parsed, [*path, "?"])["surprise"] = 1
    with pytest.raises(CorruptCheckpointError, match="'surprise'"):
        read_metadata(put(tmp_path, parsed))


VALUES: list[Any] = [None, True, False, 0, -1, 1.5, 2**63, 2**70, "", "x", [], [1], {}, {"a": 1}, {"a": None}]
LEGAL: dict[str, list[Any]] = {
    "attempt": ["", "x"],
    "step": [0],
    "created_at": ["", "x"],
    "ema": [None, {}, {"a": 1}, {"a": None}],
    "tied": [{}],
    "world_size": [0],
    "mesh": [None, {}, {"a": 1}, {"a": None}],
    "files": [{}],
    "tensors": [{}],
    "libraries": [{}],
    "counts.ema.tensors": [0],
    "counts.ema.elements": [0],
    "counts.ema.dtypes": [{}, {"a": 1}],
    "files.__0_0.distcp.size": [0],
    "tensors.embed.weight.shape": [[], [1]],
}
"""Which of ``VALUES`` a field may have; none where it is not listed."""


@pytest.mark.parametrize("path", REQUIRED_PATHS, ids=".".join)
def test_a_field_of_the_wrong_type_is_refused(tmp_path: Path, path: list[str]) -> None:
    kind = UnsupportedFormatError if path in SAYS_WHAT_IT_IS else CorruptCheckpointError
    legal = [json.dumps(value) for value in LEGAL.get(".".join(path), [])]  # as text, where True is not 1
    for value in VALUES:
        parsed = content()
        parent_of(parsed, path)[path[-1]] = value
        put(tmp_path, parsed)
        if json.dumps(value) in legal:
            read_metadata(tmp_path)
        else:
            with pytest.raises(kind, match=METADATA_FILE):
                read_metadata(tmp_path)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["models"], ["main", 1]),
        (["models"], ["main"]),  # counts has one more
        (["counts", "ema", "dtypes"], {"float32": -1}),
        (["tied", "lm_head.weight"], 1),
        (["libraries", "torch"], None),
        (["files", ".metadata", "xxh3_128"], "0" * 31),
        (["files", ".metadata", "xxh3_128"], "g" * 32),
        (["files", ".metadata", "xxh3_128"], "٣" * 32),  # digits, but not ours
        (["tensors", "norm.steps", "shape"], [3, -1]),
        (["tensors", "norm.steps", "shape"], [2.0]),
        (["tensors", "norm.steps", "shape"], [True]),
        (["tensors", "norm.steps", "dtype"], "float33"),
        (["tensors", "norm.steps", "dtype"], "save"),  # a name in torch, but of a function
        (["tensors", "norm.steps", "dtype"], "_inductor"),  # a name that torch would import a package for
        (["tensors", "norm.steps", "digest"], "+" + "0" * 31),
    ],
)
def test_a_part_of_a_field_that_is_wrong_is_refused(tmp_path: Path, path: list[str], value: object) -> None:
    parsed = content()
    parent_of(parsed, path)[path[-1]] = value
    with pytest.raises(CorruptCheckpointError, match="is damaged"):
        read_metadata(put(tmp_path, parsed))


@pytest.mark.parametrize("schema", [SCHEMA_VERSION + 1, 0, 99, "1", 1.0, True, None, [1]], ids=repr)
def test_another_schema_is_refused_by_its_number(tmp_path: Path, schema: object) -> None:
    with pytest.raises(UnsupportedFormatError, match=r"; this version reads 1 to 5$"):
        read_metadata(put(tmp_path, {**content(), "schema_version": schema, "a_field_of_the_future": 1}))


@pytest.mark.parametrize(
    "foreign",
    [
        {"train_steps": 100, "checkpoint_type": "sharded", "has_ema": True},
        {"checkpoint_type": "hf", "schema_version": 1},
        {"format": "pt"},
        {},
    ],
    ids=str,
)
def test_the_metadata_json_of_somebody_else_is_told_from_a_damaged_one(tmp_path: Path, foreign: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedFormatError, match="is not a checkpoint manifest of Shardsmith"):
        read_metadata(put(tmp_path, foreign))


NOT_JSON_OBJECTS = {
    "empty": b"",
    "spaces": b"  ",
    "zeros": bytes(4096),
    "truncated": FULL.to_json()[:-10],
    "not UTF-8": b'{"a": "\xff\xfe\xfd"}',
    "trailing": FULL.to_json() + b"{}",
    "list": b"[]",
    "number": b"1",
    "null": b"null",
    "NaN": b"NaN",
    "deep list": b"[" * 200_000,
    "deep object": b'{"a":' * 200_000 + b"1" + b"}" * 200_000,
    "more digits than Python reads": b'{"step": ' + b"9" * 10_000 + b"}",
}


@pytest.mark.parametrize("name", NOT_JSON_OBJECTS)
def test_what_is_no_json_object_is_corrupt(tmp_path: Path, name: str) -> None:
    with pytest.raises(CorruptCheckpointError, match=METADATA_FILE) as caught:
        read_json(put(tmp_path, NOT_JSON_OBJECTS[name]) / METADATA_FILE)
    assert len(str(caught.value)) < 500


HOSTILE_VALUES = {
    **{f"nested {depth}": "[" * depth + "]" * depth for depth in (10, 100, 500, 900, 990)},
    "2**70": str(2**70),
    "4000 digits": "9" * 4000,
    "huge float": "1e999",
    "NaN": "NaN",
    "-Infinity": "-Infinity",
    "long text": json.dumps("x" * 1_000_000),
    "lone surrogate": r'"\ud800"',
}


@pytest.mark.parametrize("path", [["step"], ["attempt"], ["files", ".metadata", "size"], ["tensors"]], ids=".".join)
@pytest.mark.parametrize("name", HOSTILE_VALUES)
def test_a_hostile_value_is_a_short_error_or_a_text(tmp_path: Path, name: str, path: list[str]) -> None:
    parsed = content()
    parent_of(parsed, path)[path[-1]] = "<here>"
    put(tmp_path, json.dumps(parsed).replace('"<here>"', HOSTILE_VALUES[name]).encode())
    if path == ["attempt"] and HOSTILE_VALUES[name].startswith('"'):
        assert isinstance(read_metadata(tmp_path).attempt, str)
        return
    with pytest.raises(CorruptCheckpointError) as caught:
        read_metadata(tmp_path)
    assert len(str(caught.value)) < 500


SPECIAL_FILES = {
    "FIFO": os.mkfifo,
    "directory": os.mkdir,
    "device": lambda path: os.symlink("/dev/zero", path),
    "link to itself": lambda path: os.symlink(METADATA_FILE, path),
}


@pytest.mark.parametrize("kind", SPECIAL_FILES)
def test_a_special_file_is_refused_without_being_read(tmp_path: Path, kind: str) -> None:
    SPECIAL_FILES[kind](tmp_path / METADATA_FILE)
    with pytest.raises(CheckpointError, match=METADATA_FILE):
        read_metadata(tmp_path)


def test_a_file_larger_than_any_of_ours_is_refused_without_being_read(tmp_path: Path) -> None:
    with (tmp_path / METADATA_FILE).open("wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(CorruptCheckpointError, match="is not a JSON file"):
        read_metadata(tmp_path)


def test_an_absent_file_is_not_found(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointNotFoundError, match="does not exist"):
            read_metadata(directory)


def test_the_golden_checkpoint_says_what_it_holds() -> None:
    metadata = read_metadata(SHARDED)
    assert (metadata.step, metadata.world_size, metadata.models) == (3, 2, ("main", "ema"))
    assert (metadata.ema, metadata.tied) == ({"decay": 0.5, "updates": 3}, {"head.weight": "embed.weight"})
    assert metadata.mesh == {"shape": [2], "dim_names": ["dp_shard"]}
    assert metadata.libraries == {"shardsmith": "0.1.0", "torch": "2.13.0+cpu", "python": "3.11.7"}
    main = {"float32": 42, "bfloat16": 60, "float8_e4m3fn": 9, "float64": 3, "int64": 1, "bool": 10, "float16": 0}
    assert metadata.counts == {
        "main": ModelRecord(tensors=7, elements=125, dtypes=main),
        "ema": ModelRecord(tensors=2, elements=102, dtypes={"float32": 102}),
    }
    found = {key: record.spec(key) for key, record in metadata.tensors.items()}
    assert found == {key: TensorSpec(key, *spec) for key, spec in SPECS.items()}
    assert metadata.files.keys() == {".metadata", "__0_0.distcp", "__1_0.distcp"}


def test_the_files_of_the_golden_checkpoint_have_the_recorded_sizes_and_hashes() -> None:
    assert find_damage(SHARDED) == []


def test_the_golden_checkpoint_has_the_tensors_it_was_made_of_and_their_digests_are_those_recorded() -> None:
    source, records = DcpSource(SHARDED), read_metadata(SHARDED).tensors
    assert source.specs.keys() == records.keys() == SPECS.keys()
    for key, expected in golden_tensors().items():
        stored = read_tensor(source, key)
        assert raw_bytes(stored) == raw_bytes(expected)
        assert str(digest_tensor(stored)) == records[key].digest
    assert source.read_object("optimizer.lr") == 0.5
    source.close()


def test_the_golden_checkpoint_has_the_models_it_names() -> None:
    index = DcpSource(SHARDED).index
    models = find_models(index.tensors, index.containers)
    averaged = {"embed.weight", "layer.weight"}
    assert models.keys() == {"main", "ema"}
    assert models["ema"] == {name: f"ema_model.{name}" for name in averaged}
    assert models["main"].keys() == averaged | {"layer.scale", "norm.bias", "norm.steps", "mask", "empty"}


def test_digests_are_those_of_the_golden_list() -> None:
    golden = json.loads((GOLDEN / "digests.json").read_text())
    found = {name: str(digest_tensor(tensor)) for name, tensor in digested_tensors().items()}
    assert found == golden


def digested_tensors() -> dict[str, torch.Tensor]:
    """A tensor of each dtype and of shapes that end in the middle of a word, by name."""
    shapes = [(1,), (3,), (7, 5), (2, 3, 4), (1000,)]
    named = {f"{dtype} {list(shape)}": patterned(shape, dtype, 5) for dtype in DTYPES for shape in shapes}
    return {**named, "empty": torch.empty(0, 3), "scalar": torch.tensor(1.5), "large": torch.arange(300_000)}


def test_what_a_caller_does_to_what_it_read_is_not_what_the_next_one_reads(tmp_path: Path) -> None:
    put(tmp_path, FULL.to_json())
    found = read_metadata(tmp_path)
    found.tensors.clear()
    found.files.clear()
    assert read_metadata(tmp_path) == FULL
