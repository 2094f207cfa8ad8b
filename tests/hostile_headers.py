"""Safetensors files that are not what they should be: one flaw each, with the error that tells of it."""

from __future__ import annotations

import json

import pytest

from shardsmith.errors import CorruptCheckpointError, IncompleteCheckpointError, UnsupportedFormatError


def framed(text: str | bytes, payload: bytes = b"") -> bytes:
    text = text.encode() if isinstance(text, str) else text
    return len(text).to_bytes(8, "little") + text + payload


def entry(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4), **more: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def one(*args: object, name: str = "a", payload: int = 4, **more: object) -> bytes:
    return framed(json.dumps({name: entry(*args, **more)}), bytes(payload))


def two(first: list[int], second: list[int], payload: int = 8) -> bytes:
    return framed(json.dumps({"a": entry(offsets=first), "b": entry(offsets=second)}), bytes(payload))


CORRUPT = {
    "header over 100 MB": (100_000_001).to_bytes(8, "little") + b"{}",
    "header of 2**64 - 1": b"\xff" * 8 + b"{}",
    "header of 2**63": (2**63).to_bytes(8, "little") + b"{}",
    "empty header": framed(""),
    "only spaces": framed("        "),
    "leading space": framed(" {}"),
    "byte order mark": framed("\ufeff{}"),
    "newline as padding": framed("{}\n"),
    "NUL as padding": framed("{}\0"),
    "two documents": framed("{}{}"),
    "not UTF-8": framed(b'{"\xff":{}}'),
    "overlong UTF-8": framed(b'{"\xc0\xaf":{}}'),
    "UTF-16": framed('{"a":{}}'.encode("utf-16-le")),
    "unfinished": framed('{"a":'),
    "a list": framed("[]"),
    "a string": framed('"{}"'),
    "null": framed("null"),
    "depth bomb of lists": framed('{"a":' + "[" * 500_000 + "]" * 500_000 + "}"),
    "depth bomb of objects": framed('{"a":' * 200_000 + "1" + "}" * 200_000),
    "duplicate tensor": framed('{"a":%s,"a":%s}' % ((json.dumps(entry()),) * 2), bytes(4)),
    "duplicate field": framed('{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "duplicate metadata": framed('{"__metadata__":{},"__metadata__":{}}'),
    "duplicate metadata key": framed('{"__metadata__":{"a":"1","a":"2"}}'),
    "metadata is a list": framed('{"__metadata__":[]}'),
    "metadata is null": framed('{"__metadata__":null}'),
    "metadata is a number": framed('{"__metadata__":{"a":1}}'),
    "metadata is nested": framed('{"__metadata__":{"a":{}}}'),
    "lone surrogate in metadata": framed('{"__metadata__":{"a":"\\ud800"}}'),
    "lone surrogate in a name": one(name="\udc00"),
    "NUL in a name": one(name="a\0b"),
    "control character in a name": one(name="a\nb").replace(b"\\n", b"\n "),
    "entry is a list": framed('{"a":["F32",[1],[0,4]]}', bytes(4)),
    "entry is null": framed('{"a":null}'),
    "entry is empty": framed('{"a":{}}'),
    "field missing": framed('{"a":{"dtype":"F32","shape":[1]}}', bytes(4)),
    "field too many": one(more=1),
    "overlap": two([0, 4], [2, 6], payload=6),
    "the same place twice": two([0, 4], [0, 4], payload=4),
    "hole": two([0, 4], [8, 12], payload=12),
    "hole at the front": one(offsets=[4, 8], payload=8),
    "trailing bytes": one(payload=5),
    "trailing bytes of no tensor": framed("{}", bytes(1)),
    "negative offset": one(offsets=[-4, 0], payload=0),
    "minus zero": framed('{"a":{"dtype":"F32","shape":[1],"data_offsets":[-0,4]}}', bytes(4)),
    "reversed offsets": one(offsets=[4, 0]),
    "one offset": one(offsets=[0]),
    "three offsets": one(offsets=[0, 4, 4]),
    "offsets are strings": one(offsets=["0", "4"]),
    "offsets are an object": one(offsets={"0": 4}),
    "shape too small": one(offsets=[0, 8], payload=8),
    "shape too large": one(shape=[2]),
    "wider dtype": one("F64"),
    "shape is a number": one(shape=1),
    "shape is null": one(shape=None),
    "negative size": one(shape=[-1]),
    "two negative sizes": one(shape=[-1, -1]),
    "bool size": one(shape=[True]),
    "float size": one(shape=[1.0]),
    "size with an exponent": framed('{"a":{"dtype":"F32","shape":[1e0],"data_offsets":[0,4]}}', bytes(4)),
    "string size": one(shape=["1"]),
    "nested size": one(shape=[[1]]),
    "NaN size": one(shape=[float("nan")]),
    "infinite size": one(shape=[float("inf")]),
    "size with 5000 digits": framed('{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,4]}}' % ("9" * 5000), bytes(4)),
    "sizes that wrap to one": one(shape=[2**32, 2**32, 1]),
    "bytes that wrap to zero": one(shape=[2**62], offsets=[0, 0], payload=0),
    "empty shape that overflows": one(shape=[0, 2**62], offsets=[0, 0], payload=0),
    "offsets past 2**63": one(shape=[2**61], offsets=[0, 2**63]),
}
INCOMPLETE = {
    "no bytes": b"",
    "7 bytes": bytes(7),
    "header cut off": framed("{}" + " " * 6)[:-1],
    "header of 100 MB that is not there": (100_000_000).to_bytes(8, "little") + b"{}",
    "no payload": one(payload=0),
    "payload one byte short": one(payload=3),
    "huge tensor": one(shape=[2**40], offsets=[0, 2**42]),
}
UNSUPPORTED = {
    "unknown dtype": one("F99"),
    "dtype in lower case": one("f32"),
    "dtype is a number": one(4),
    "dtype is null": one(None),
    "dtype is a list": one(["F32"]),
    "dtype of a megabyte": one("F" * 1_000_000),
    "six-bit floats": one("F6_E2M3", [4], [0, 3], payload=3),
    "odd number of F4": one("F4", [3, 1], [0, 2], payload=2),
    "half an F4 row": one("F4", [2, 1], [0, 1], payload=1),
    "too many dimensions": one(shape=[1] * 65),
}
HOSTILE = [
    pytest.param(data, error, id=name)
    for error, corpus in [
        (CorruptCheckpointError, CORRUPT),
        (IncompleteCheckpointError, INCOMPLETE),
        (UnsupportedFormatError, UNSUPPORTED),
    ]
    for name, data in corpus.items()
]
