"""The index of a DCP directory is a pickle: it is read, never run."""

from __future__ import annotations

import pickle
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from shardsmith.errors import (
    CheckpointError,
    CorruptCheckpointError,
    IncompleteCheckpointError,
    UnsafeCheckpointError,
    UnsupportedFormatError,
)
from shardsmith.formats.dcp.index import read_index
from shardsmith.formats.dcp.index_pickle import load_dcp_index
from shardsmith.formats.dcp.saved_index import SavedBytes, SavedIndex, SavedTensor
from shardsmith.formats.torch_files.pickle_machine import _Machine, read_pickle
from shardsmith.tensors.tensors import Chunk
from tests import dcp_directories, hostile_pickles
from tests.pickle_parts import (
    CHECKPOINT,
    OLD_TORCH,
    call,
    index,
    listing,
    mapping,
    name,
    number,
    properties,
    record,
    sequence,
    size,
    storage,
    tensor,
    text,
    whole,
)

PATH = Path("step-5/.metadata")
CANARY = Path("/tmp/shardsmith-canary-that-no-test-makes")
HOSTILE = dict([*hostile_pickles.calls(CANARY), *hostile_pickles.instructions(CANARY)])

_events: list[str] | None = None


def _watch(event: str, _args: tuple[Any, ...]) -> None:
    if _events is not None:
        _events.append(event)


sys.addaudithook(_watch)  # for the life of the process: there is no way to take one away


@contextmanager
def watched() -> Iterator[list[str]]:
    """The audit events of the body: imports, opened files, started processes, executed code and so on."""
    global _events
    events: list[str] = []
    _events = events
    try:
        yield events
    finally:
        _events = None


@pytest.fixture(scope="module")
def real_index(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    directory = tmp_path_factory.mktemp("real") / "step-5"
    dcp_directories.save(
        {"model": {"w": torch.ones(3, 4), "n": torch.tensor(5)}, "lr": 0.1, "l": [1, {"a": 2}]}, directory
    )
    return (directory / ".metadata").read_bytes()


def as_ours(theirs: Metadata) -> SavedIndex:
    """What torch's own objects say, in our words."""
    entries: dict[str, SavedTensor | None] = {}
    for key, entry in theirs.state_dict_metadata.items():
        entries[key] = None
        if not isinstance(entry, BytesStorageMetadata):
            chunks = tuple(Chunk(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks)
            entries[key] = SavedTensor(tuple(entry.size), entry.properties.dtype, chunks)
    places = {
        (at.fqn, None if at.offset is None else tuple(at.offset)): SavedBytes(
            info.relative_path, info.offset, info.length, tuple(info.transform_descriptors or ())
        )
        for at, info in theirs.storage_data.items()
    }
    return SavedIndex(entries, theirs.planner_data, places)


def test_a_real_index_is_read_as_torch_reads_it(real_index: bytes) -> None:
    ours, theirs = load_dcp_index(real_index, PATH), pickle.loads(real_index)
    assert ours == as_ours(theirs)
    assert len(ours.entries) == len(ours.places) == len(ours.containers) == 5


def test_there_are_enough_attacks_and_they_work_on_pickle_itself(tmp_path: Path) -> None:
    attacks = dict(hostile_pickles.calls(tmp_path / "canary"))
    pickle.loads(attacks["'os' 'system'"])
    assert (tmp_path / "canary").exists()
    assert len(HOSTILE) >= 80


@pytest.mark.parametrize("case", HOSTILE)
def test_a_pickle_that_asks_for_code_is_refused_and_nothing_happens(case: str) -> None:
    with watched() as events, pytest.raises(UnsafeCheckpointError, match=r"step-5/\.metadata"):
        load_dcp_index(HOSTILE[case], PATH)
    assert not CANARY.exists()
    assert events == []


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_a_pickled_function_call_is_refused_in_every_protocol(protocol: int) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return eval, (f"open({str(CANARY)!r}, 'w')",)

    with pytest.raises((UnsafeCheckpointError, CorruptCheckpointError)):
        load_dcp_index(pickle.dumps(Attack(), protocol), PATH)
    assert not CANARY.exists()


METADATA = name(CHECKPOINT, "Metadata")
W = text("w")
MALFORMED = {
    "empty": b"",
    "one byte": b"\x80",
    "no pickle": b"PK\x03\x04 something else",
    "text pickle": pickle.dumps({"a": 1}, 0),
    "protocol of the future": whole(index(), 6),
    "no stop": whole(index())[:-1],
    "something behind the end": whole(index()) + b"N.",
    "two pickles": whole(index()) * 2,
    "two values": whole(index() + pickle.NONE),
    "an open mark": whole(pickle.MARK + index()),
    "nothing on the stack": whole(b""),
    "a list": whole(listing(number(1))),
    "a dict": whole(mapping({W: W})),
    "a class and no object": whole(METADATA),
    "another record": whole(tensor()),
    "arguments": whole(METADATA + sequence(W) + pickle.NEWOBJ),
    "state of a class": whole(METADATA + sequence(pickle.NONE, mapping({text("version"): W})) + pickle.BUILD),
    "state twice": whole(index() + mapping({W: W}) + pickle.BUILD),
    "state that is no dict": whole(METADATA + pickle.EMPTY_TUPLE + pickle.NEWOBJ + W + pickle.BUILD),
    "state of slots": whole(
        METADATA
        + pickle.EMPTY_TUPLE
        + pickle.NEWOBJ
        + sequence(pickle.NONE, mapping({text("__class__"): W}))
        + pickle.BUILD
    ),
    "attributes of the class": whole(index({"state_dict_metadata": mapping({W: METADATA})})),
    "append to a tuple": whole(pickle.EMPTY_TUPLE + W + pickle.APPEND),
    "item of a list": whole(pickle.EMPTY_LIST + W + W + pickle.SETITEM),
    "odd items": whole(pickle.EMPTY_DICT + pickle.MARK + W + pickle.SETITEMS),
    "a key twice": whole(pickle.EMPTY_DICT + pickle.MARK + W + W + W + W + pickle.SETITEMS),
    "an unhashable key": whole(mapping({listing(): W})),
    "a key of nested tuples": whole(mapping({b")" + b"\x85" * 100_000: W})),
    "unknown memo entry": whole(b"h\x05"),
    "memo of nothing": whole(pickle.MEMOIZE),
    "tuple of too few": whole(W + pickle.TUPLE3),
    "frame beyond the end": whole(pickle.FRAME + (1 << 62).to_bytes(8, "little") + index()),
    "string beyond the end": whole(pickle.BINUNICODE + b"\xff\xff\xff\xff" + b"x"),
    "huge string": whole(pickle.BINUNICODE8 + (1 << 62).to_bytes(8, "little")),
    "huge bytes": whole(pickle.BINBYTES8 + (1 << 62).to_bytes(8, "little")),
    "negative long": whole(pickle.LONG4 + b"\xff\xff\xff\xff"),
    "no utf-8": whole(pickle.SHORT_BINUNICODE + b"\x02\xff\xff"),
    "duplicate the stack": whole(index() + pickle.DUP),
    "pop": whole(index() + pickle.NONE + pickle.POP),
    "float": whole(pickle.BINFLOAT + b"\0" * 8),
    "set": whole(pickle.EMPTY_SET),
    "a global of no strings": whole(pickle.NONE + pickle.NONE + pickle.STACK_GLOBAL),
    "a global without end": whole(b"c" + b"x" * 1000),
    "call a string": whole(W + sequence() + pickle.REDUCE),
    "call a dtype": whole(index({"planner_data": call(name("torch", "float32"), W)})),
    "key that is no string": whole(index({"state_dict_metadata": mapping({number(3): tensor()})})),
    "negative size": whole(index({"state_dict_metadata": mapping({W: tensor({"size": size(-4)})})})),
    "size of 2**63": whole(index({"state_dict_metadata": mapping({W: tensor({"size": size(1 << 63)})})})),
    "size of bools": whole(index({"state_dict_metadata": mapping({W: tensor({"size": sequence(pickle.NEWTRUE)})})})),
    "65 dimensions": whole(index({"state_dict_metadata": mapping({W: tensor({"size": size(*[1] * 65)})})})),
    "chunks missing": whole(index({"state_dict_metadata": mapping({W: tensor({"chunks": pickle.NONE})})})),
    "dtype that is a string": whole(
        index({"state_dict_metadata": mapping({W: tensor({"properties": properties(dtype=text("float32"))})})})
    ),
    "dtype that is a class": whole(
        index({"state_dict_metadata": mapping({W: tensor({"properties": properties(dtype=name("torch", "Size"))})})})
    ),
    "getattr of a class": whole(index({"planner_data": call(name("builtins", "getattr"), METADATA, text("__init__"))})),
    "storage of an unknown kind": whole(index({"storage_data": mapping({W: storage()})})),
    "path of numbers": whole(index({"planner_data": mapping({W: sequence(pickle.NONE)})})),
    "file name that is a number": whole(
        index(
            {
                "storage_data": mapping(
                    {record(name(CHECKPOINT, "MetadataIndex"), {"fqn": W}): storage({"relative_path": number(1)})}
                )
            }
        )
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_index_is_corrupt(case: str) -> None:
    with watched() as events, pytest.raises(CorruptCheckpointError, match=r"step-5/\.metadata"):
        load_dcp_index(MALFORMED[case], PATH)
    assert events == []


def test_an_honest_index_made_by_hand_is_read() -> None:
    assert load_dcp_index(whole(index()), PATH) == as_ours(pickle.loads(whole(index())))


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])  # Python 3.13 writes the latter
@pytest.mark.parametrize("kind", ["PosixPath", "WindowsPath", "PurePosixPath"])
def test_a_path_of_any_python_and_system_is_harmless(module: str, kind: str) -> None:
    where = call(name(module, kind), text("/"), text("run"), text("step-5"))
    meta = record(name(CHECKPOINT, "StorageMeta"), {"checkpoint_id": where, "save_id": text("x")})
    assert load_dcp_index(whole(index({"storage_meta": meta})), PATH) == load_dcp_index(whole(index()), PATH)


def test_properties_as_older_versions_pickled_them_are_read() -> None:
    # torch < 2.2 had the class in another module; Python 3.11.0 pickled enums by getattr
    old_format = call(
        name("builtins", "getattr"), name(OLD_TORCH, "MEM_FORMAT_ENCODING"), text("TORCH_CONTIGUOUS_FORMAT")
    )
    old = tensor({"properties": properties(name("torch", "bfloat16"), memory_format=old_format, module=OLD_TORCH)})
    found = load_dcp_index(whole(index({"state_dict_metadata": mapping({W: old})})), PATH)
    assert found.entries["w"] == SavedTensor((4,), torch.bfloat16, (Chunk((0,), (4,)),))


@pytest.mark.parametrize("strides", [pickle.NONE, sequence(number(1))])
def test_the_strides_that_torch_2_15_adds_to_properties_are_passed_over(strides: bytes) -> None:
    newer = tensor({"properties": properties(None, None, None, CHECKPOINT, strides)})
    found = load_dcp_index(whole(index({"state_dict_metadata": mapping({W: newer})})), PATH)
    assert found.entries["w"] == SavedTensor((4,), torch.float32, (Chunk((0,), (4,)),))


def test_a_field_of_a_newer_torch_is_passed_over() -> None:
    newer = whole(index({"flavour": text("new"), "planner_data": pickle.NONE}), 5)
    assert load_dcp_index(newer, PATH).containers == {}


def test_a_sparse_tensor_is_not_supported() -> None:
    sparse = properties(layout=call(name("torch.serialization", "_get_layout"), text("torch.sparse_coo")))
    with pytest.raises(UnsupportedFormatError, match="sparse"):
        load_dcp_index(whole(index({"state_dict_metadata": mapping({W: tensor({"properties": sparse})})})), PATH)


def test_parts_shared_over_and_over_cost_no_time() -> None:
    # 3 000 tensors that share one list of 30 000 chunks: 90 million chunks in a file of under a megabyte
    chunk = record(name(CHECKPOINT, "ChunkStorageMetadata"), {"offsets": size(0), "sizes": size(4)})
    chunks = chunk + b"r\x01\0\0\0" + pickle.EMPTY_LIST + pickle.MARK + b"h\x01" * 30_000 + pickle.APPENDS
    shared = tensor({"chunks": chunks}) + b"r\x02\0\0\0"
    tensors = mapping({text("w"): shared} | {text(f"w{i}"): b"h\x02" for i in range(3_000)})
    began = time.process_time()
    with pytest.raises(CorruptCheckpointError):
        load_dcp_index(whole(index({"state_dict_metadata": tensors})), PATH)
    assert time.process_time() - began < 15  # it takes less than one; chunk by chunk, minutes


@pytest.mark.parametrize(
    "pair",
    [pickle.EMPTY_LIST + b"q\x00h\x00a", b")" + b"\x85" * 300_000, b"(" * 300_000],
    ids=["cycle", "tuples", "marks"],
)
def test_nesting_without_end_is_corrupt(pair: bytes) -> None:
    with pytest.raises(CorruptCheckpointError):
        load_dcp_index(whole(pair), PATH)


def test_an_index_cut_off_anywhere_is_corrupt(real_index: bytes) -> None:
    for length in range(len(real_index)):
        with pytest.raises(CorruptCheckpointError):
            load_dcp_index(real_index[:length], PATH)


@settings(max_examples=600, deadline=20_000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6))
def test_changed_bytes_never_cause_another_error(real_index: bytes, changes: list[tuple[float, int]]) -> None:
    data = bytearray(real_index)
    for where, value in changes:
        data[int(where * len(data))] = value
    with watched() as events, suppress(UnsafeCheckpointError, CorruptCheckpointError, UnsupportedFormatError):
        load_dcp_index(bytes(data), PATH)
    assert not {"open", "os.system", "exec", "compile", "import"} & set(events)


@settings(max_examples=300, deadline=20_000)
@given(
    body=st.lists(st.sampled_from([bytes([i]) for i in range(256)] + [W, number(3), METADATA, index()]), max_size=40)
)
def test_random_instructions_never_cause_another_error(body: list[bytes]) -> None:
    with pytest.raises((UnsafeCheckpointError, CorruptCheckpointError, UnsupportedFormatError)):
        load_dcp_index(whole(b"".join(body) + pickle.NONE), PATH)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**31), 2**31) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.lists(inner, max_size=5).map(tuple)
        | st.dictionaries(st.text(max_size=3), inner, max_size=4)
    ),
)


@given(PLAIN, st.integers(2, 5), st.data())
def test_frequent_instructions_do_without_a_call_what_their_handlers_do(
    value: object, protocol: int, data: st.DataObject
) -> None:
    pickled = pickle.dumps([value, value], protocol)
    assert read_pickle(pickled, PATH, frozenset()) == [value, value]
    cut = pickled[: data.draw(st.integers(0, len(pickled)))]
    damaged = cut + bytes(data.draw(st.lists(st.sampled_from(b"h\x94jK\x85\x86)}N."), max_size=6)))
    with pytest.MonkeyPatch.context() as patch:
        quick = outcome(damaged)
        patch.setattr(_Machine, "next_rare", _Machine.byte)
        assert outcome(damaged) == quick


def outcome(data: bytes) -> str:
    try:
        return repr(read_pickle(data, PATH, frozenset()))
    except CheckpointError as error:
        return type(error).__name__


def test_an_index_is_decoded_once_and_its_files_are_looked_at_each_time(tmp_path: Path) -> None:
    directory = tmp_path / "step-1"
    dcp_directories.save({"w": torch.ones(3)}, directory)
    assert read_index(directory) is read_index(directory)
    next(directory.glob("*.distcp")).write_bytes(b"")
    with pytest.raises(IncompleteCheckpointError):
        read_index(directory)
