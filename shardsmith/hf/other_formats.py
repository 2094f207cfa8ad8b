"""Weights in formats that are not read here: the base model's own, as far as anyone knows, exported for a runtime.

Beside new weights they would be old ones, in a file that its runtime loads without asking.
"""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path, PurePath

from shardsmith.ground.local_copy import first_bytes

_BY_NAME = {
    "ONNX": ("*.onnx", "*.onnx_data*", "*.onnx.data*", "*.ort"),
    "llama.cpp": ("*.gguf", "*.ggml", "*.ggmlv3*"),
    "TensorFlow": (
        "*.h5",
        "*.keras",
        "saved_model.pb",
        "keras_metadata.pb",
        "*.data-?????-of-?????",
        "variables.index",
    ),
    "TensorFlow Lite": ("*.tflite",),
    "Flax": ("*.msgpack",),
    "Core ML": ("*.mlmodel",),
    "MLC": ("params_shard_*.bin", "ndarray-cache.json", "tensor-cache.json"),
    "ExecuTorch": ("*.pte",),
    "TensorRT": ("*.engine",),
    "tch-rs": ("*.ot",),
    "Paddle": ("*.pdparams", "*.pdiparams", "*.pdmodel"),
    "OpenVINO": ("openvino*.bin", "openvino*.xml"),
    "another project": ("consolidated*", "*.pth"),
}
_FOLDERS = {"Core ML": (".mlpackage", ".mlmodelc")}
_OPAQUE = (".bin", ".dat", ".weights")
"""Suffixes that say nothing: the first bytes do."""
_MAGIC = {
    "llama.cpp": (b"GGUF", b"lmgg", b"fmgg", b"tjgg"),
    "TensorFlow": (b"\x89HDF\r\n\x1a\n",),
}
_NETWORK = re.compile(rb"<net[\s>]")


def other_format(base: Path, name: str) -> str | None:
    """Return whose format a file has, if it holds weights, or what belongs to them, in one that is not read here.

    Args:
        base: The base model's directory.
        name: Path of the file in it.
    """
    place = PurePath(name)
    for project, suffixes in _FOLDERS.items():
        if any(parent.suffix in suffixes for parent in place.parents):
            return project
    for project, patterns in _BY_NAME.items():
        if any(fnmatch.fnmatchcase(place.name, pattern) for pattern in patterns):
            return project
    if place.suffix not in (*_OPAQUE, ".xml") or not (base / name).is_file():
        return None
    # OpenVINO has its weights beside a description of the network, both of one name.
    described = (base / name).with_suffix(".xml")
    if place.suffix in (".bin", ".xml") and described.is_file() and _NETWORK.search(first_bytes(described, 4096)):
        return "OpenVINO"
    begins = first_bytes(base / name, 8) if place.suffix in _OPAQUE else b""
    return next((project for project, magic in _MAGIC.items() if begins.startswith(magic)), None)
