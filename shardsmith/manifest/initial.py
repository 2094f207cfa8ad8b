"""What ``metadata.json`` says of a checkpoint that training is to start from: what it was made of, and what the model
must look like beside its state dict. docs/format.md specifies it.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
import xxhash
from torch import Tensor

from shardsmith.manifest.fields import (
    count,
    digest_text,
    known_dtype,
    require_fields,
    shape,
    texts,
    typed,
    typed_or_none,
)
from shardsmith.tensors.digest import digest_tensor
from shardsmith.tensors.dtypes import dtype_name

_MOST_BYTES = 1 << 16
"""Of a buffer whose values are recorded; of larger ones the digest must do."""
_NOT_THE_MODEL = frozenset({"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"})
"""What a config says of the directory that it was read from, and not of what the model computes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BufferRecord:
    """A buffer that no state dict holds, as a fresh model has it."""

    shape: tuple[int, ...]
    """Global shape."""
    dtype: str
    """As torch names it, without ``torch.``."""
    digest: str
    """``shardsmith.tensors.digest``, 32 hexadecimal digits."""
    values: str | None
    """Its bytes in base64, as safetensors would store them, or None where they are more than 64 KiB."""

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        """Describe a buffer on any device."""
        plain = tensor.detach().cpu().contiguous()
        nbytes = plain.numel() * plain.element_size()
        data = bytes(plain.reshape(-1).view(torch.uint8).tolist()) if nbytes <= _MOST_BYTES else None
        return cls(
            shape=tuple(plain.shape),
            dtype=dtype_name(plain.dtype),
            digest=str(digest_tensor(plain)),
            values=None if data is None else base64.b64encode(data).decode(),
        )

    @classmethod
    def parse(cls, record: Any) -> Self:
        """Raises KeyError, TypeError or ValueError."""
        require_fields(record, cls)
        made = cls(
            shape=shape(record["shape"]),
            dtype=known_dtype(record["dtype"]),
            digest=digest_text(record["digest"]),
            values=typed_or_none(record["values"], str),
        )
        made.tensor()  # raises if the bytes are not those of such a tensor
        return made

    def tensor(self) -> Tensor | None:
        """Return the values, where they are recorded."""
        if self.values is None:
            return None
        try:
            data = bytearray(base64.b64decode(self.values, validate=True))
        except binascii.Error as error:
            raise ValueError(f"values of a buffer are no base64: {error}") from None
        dtype = getattr(torch, self.dtype)
        wanted = torch.Size(self.shape).numel() * dtype.itemsize
        if len(data) != wanted:
            raise ValueError(f"values of a buffer have {len(data)} bytes, expected {wanted}")
        # frombuffer refuses an empty buffer.
        flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype, device="cpu")
        return flat.reshape(self.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class InitialRecord:
    """The field ``initial`` of ``metadata.json``."""

    source: str
    """Name of the directory, or of the model on the Hub, that the weights were taken from."""
    source_format: str
    """Its format, as ``shardsmith detect`` names it."""
    names: str
    """How the files' names became the model's: ``identity``, ``transformers``, or a map's name."""
    cast_to: str | None
    """Dtype that floating-point tensors were cast to, or None where they are as in the source."""
    model_class: str | None
    """Class of the model that named the tensors, or None where nothing knew the model."""
    config: dict[str, Any] | None
    """The effective config of that model, with every default filled in."""
    config_xxh3_128: str | None
    """``config_hash`` of it."""
    tokenizer: dict[str, str]
    """XXH3-128 of each file of the tokenizer, by name."""
    buffers: dict[str, BufferRecord]
    """The non-persistent buffers of a fresh model, by name."""
    heads: dict[str, tuple[str, ...]]
    """What was trained beside the model: name of the head -> its keys, which begin with random values."""
    seed: int | None
    """That the heads were made with, or None without any."""

    @classmethod
    def parse(cls, record: Any) -> Self:
        """Raises KeyError, TypeError or ValueError."""
        require_fields(record, cls)
        config_hash = record["config_xxh3_128"]
        return cls(
            source=typed(record["source"], str),
            source_format=typed(record["source_format"], str),
            names=typed(record["names"], str),
            cast_to=None if record["cast_to"] is None else known_dtype(record["cast_to"]),
            model_class=typed_or_none(record["model_class"], str),
            config=typed_or_none(record["config"], dict),
            config_xxh3_128=None if config_hash is None else digest_text(config_hash),
            tokenizer={name: digest_text(found) for name, found in texts(record["tokenizer"]).items()},
            buffers={name: BufferRecord.parse(found) for name, found in typed(record["buffers"], dict).items()},
            heads={
                name: tuple(typed(key, str) for key in typed(keys, list))
                for name, keys in typed(record["heads"], dict).items()
            },
            seed=None if record["seed"] is None else count(record["seed"]),
        )


def config_hash(config: Mapping[str, Any]) -> str:
    """XXH3-128 of what a config says of the model, and not of where it came from; docs/format.md says how."""
    meant = {key: value for key, value in config.items() if key not in _NOT_THE_MODEL}
    text = json.dumps(meant, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return str(xxhash.xxh3_128_hexdigest(text.encode()))
