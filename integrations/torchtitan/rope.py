"""Rotary embeddings: the tables of TorchTitan's models, and those of the config that their weights come with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardsmith.load.faults import LoadFault
from shardsmith.load.live_weights import LiveWeights
from shardsmith.tensors.fqn import clean_fqn, non_persistent_buffers

from .models import package_of

_TABLES = ("cache", "freqs_cis", "rope_cache")
"""How TorchTitan calls the buffers that hold them."""
_TYPES = {"none": "default", "llama": "llama3"}
_LLAMA = {
    "scaling_factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_max_position_embeddings",
}
_YARN = {
    "rope_factor": "factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "original_seq_len": "original_max_position_embeddings",
}
_NTK = {
    "rope_factor": "factor",
    "ntk_beta": "beta_fast",
    "ntk_alpha": "beta_slow",
    "original_seq_len": "original_max_position_embeddings",
}
"""What GPT-OSS of 0.2 calls these."""
_NEIGHBOURS = {"llama3": True, "llama4": True, "deepseek_v3": True, "qwen3": False, "gpt_oss": False}
"""Package of a model: whether two neighbours in a head turn together once TorchTitan's adapter has brought the weights
into the order of the model. Else two that are half a head apart do."""
# Tables in float32 that were computed in another order differ by less.
_RELATIVE = 1e-5


@dataclass(frozen=True, slots=True)
class RopeOfConfig:
    """How the model of a config turns queries and keys.

    Attributes:
        settings: As config.json calls them: rope_type, rope_theta, factor and so on.
        inv_freq: Angle of each pair at position 1; float32, (head_dim / 2,).
        scale: Factor of the products of queries and keys.
        stretch: Factor of queries and of keys that is part of that, by which some tables are multiplied.
        alone: Factor of the rotary part of queries and of keys, where heads have another part; 1 elsewhere.
    """

    settings: Mapping[str, Any]
    inv_freq: Tensor
    scale: float | None
    stretch: float = 1.0
    alone: float = 1.0

    @classmethod
    def of(cls, model: nn.Module, config: Mapping[str, Any]) -> Self | None:
        """Of a model of transformers; None where it has no rotary embedding, or several."""
        found: list[Any] = [m for m in model.modules() if isinstance(getattr(m, "inv_freq", None), Tensor)]
        if len(found) != 1:
            return None
        stretch = float(getattr(found[0], "attention_scaling", 1.0))
        scales = [s for m in model.modules() if isinstance(s := getattr(m, "scaling", None), float)]
        settings = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        settings.setdefault("rope_theta", config.get("rope_theta"))
        settings.setdefault("rope_type", "default")
        alone = 1.0
        if config.get("qk_nope_head_dim"):  # a stretch of the rotary part is none of the whole head
            stretch, alone = alone, stretch
        # transformers stretches both queries and keys, as GPT-OSS of 0.2 does; TorchTitan's others their products
        return cls(settings, found[0].inv_freq.float(), scales[0] * stretch**2 if scales else None, stretch, alone)

    def table_like(self, table: Tensor) -> Tensor | None:
        """The table of the same positions and layout as one of TorchTitan's; None for a layout that is not known."""
        # (positions, head_dim / 2): the angle of each pair at each position.
        angles = torch.outer(torch.arange(table.shape[0], dtype=torch.float32, device="cpu"), self.inv_freq)
        # Complex: one number of length 1 for each pair.
        if table.is_complex() and table.shape == angles.shape:
            return torch.polar(torch.ones_like(angles), angles)
        # Real: the cosines, then the sines, each for both halves of a head.
        if not table.is_complex() and table.shape == (angles.shape[0], 4 * angles.shape[1]):
            both = torch.cat([angles, angles], dim=-1)
            right = torch.cat([both.cos(), both.sin()], dim=-1)
            return right * self.stretch if self.is_stretched(table) else right
        return None

    def is_stretched(self, table: Tensor) -> bool:
        """Return whether a table of cosines and sines is multiplied by ``stretch``: at position 0 the cosine is 1."""
        first = 1.0 if table.is_meta or table.is_complex() or not table.numel() else table[0, 0].item()
        return self.stretch != 1 and math.isclose(first, self.stretch, rel_tol=_RELATIVE)


class Reference:
    """Makes a model anew, with the tables of a config. A ``Fresh``."""

    def __init__(self, make: Callable[[], nn.Module], rope: RopeOfConfig, config: str) -> None:
        """``config`` says where the config is from, for people."""
        self._make, self._rope = make, rope
        self.origin = f"the trainer's model, with rotary tables of {config}"

    def __call__(self) -> nn.Module:
        """Return a new model."""
        return with_tables_of(self._make(), self._rope)


def with_tables_of(model: nn.Module, rope: RopeOfConfig) -> nn.Module:
    """Return the model, whose tables have become those of a config: the reference for the buffers of a live one."""
    made: dict[tuple[Any, ...], Tensor] = {}
    for module, name, table in _tables(model):
        # One table for all modules that have one of the same shape and dtype.
        kind = (*table.shape, table.dtype)
        if kind not in made and (right := rope.table_like(table)) is not None:
            made[kind] = right
        if kind in made:
            module._buffers[name] = made[kind]
    return model


def rope_faults(live: LiveWeights, rope: RopeOfConfig, origin: str) -> list[LoadFault]:
    """Settings of the rotary embedding that are not those of a config; or, where no setting says it, the angles."""
    faults: dict[str, LoadFault] = {}
    for part in live.parts:
        for where, found in rope_settings(part):
            for name, value in found.items():
                expected = rope.settings.get(name)
                if expected is not None and not _same(value, expected):
                    words = f"{value} in the trainer ({where}), {expected} in {origin}"
                    name = name if name.startswith("rope_") else f"rope_{name}"
                    faults.setdefault(name, LoadFault("rope-differs", name, words + _why(part, name, value)))
    if rope.alone != 1:
        words = f"rotary parts of queries and keys are multiplied by {rope.alone:g} in {origin}, by 1 in the trainer"
        faults["rope_mscale"] = LoadFault("rope-differs", "rope_mscale", words)
    faults |= {fault.name: fault for part in live.parts for fault in _pair_faults(part, origin)}
    if not faults:
        faults |= {fault.name: fault for part in live.parts for fault in _angle_faults(part, rope, origin)}
    return [*faults.values()]


def rope_settings(model: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield where a model of TorchTitan has a rotary embedding, and its settings by their names in config.json."""
    arguments: Any = getattr(model, "model_args", None)  # 0.2 has one for the whole model
    if arguments is not None and hasattr(arguments, "rope_theta"):
        yield "model_args", _settings_0_2(arguments)
    for name, module in model.named_modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "theta") and hasattr(config, "scaling"):
            yield clean_fqn(name, model), _settings_0_3(config)


def _settings_0_3(config: Any) -> dict[str, Any]:
    # With a factor of 1 YaRN changes nothing.
    scaling = config.scaling if config.scaling != "yarn" or config.rope_factor > 1 else "none"
    more = {"llama": _LLAMA, "yarn": _YARN}.get(scaling, {})
    names = {theirs: getattr(config, ours) for ours, theirs in more.items()}
    return {"rope_theta": config.theta, "rope_type": _TYPES.get(scaling, scaling), **names}


def _settings_0_2(arguments: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"rope_theta": arguments.rope_theta, "rope_type": "default"}
    holder, more = getattr(arguments, "rope_scaling_args", None), _LLAMA
    if holder is not None:
        found["rope_type"] = "llama3"
    elif hasattr(arguments, "ntk_beta"):
        if arguments.rope_factor > 1:
            found["rope_type"], holder, more = "yarn", arguments, _NTK
    # 0.2 leaves YaRN out for sequences up to the original length.
    elif hasattr(arguments, "original_seq_len") and arguments.max_seq_len > arguments.original_seq_len:
        found["rope_type"], holder, more = "yarn", arguments, _YARN
    if holder is not None:
        found |= {theirs: getattr(holder, ours) for ours, theirs in more.items() if hasattr(holder, ours)}
    return found


def _why(model: nn.Module, name: str, value: Any) -> str:
    arguments: Any = getattr(model, "model_args", None)
    if name != "rope_type" or value != "default" or not hasattr(arguments, "original_seq_len"):
        return ""
    return (
        f"; TorchTitan 0.2 leaves YaRN out while training.seq_len ({arguments.max_seq_len}) is not above "
        f"original_seq_len ({arguments.original_seq_len}): train on longer sequences, or make original_seq_len smaller "
        "than they are in the flavor and in config.json"
    )


def _pair_faults(model: nn.Module, origin: str) -> Iterator[LoadFault]:
    """A table that turns other pairs than the weights are ordered for. 0.3 has two classes of them, for any model."""
    neighbours = _NEIGHBOURS.get(package_of(model) or "")
    words = {True: "neighbours in a head", False: "the halves of a head"}
    for module, _, table in _tables(model):
        if neighbours is not None and table.is_complex() != neighbours:
            found = f"{type(module).__name__} turns {words[not neighbours]} together"
            yield LoadFault("rope-differs", "rope_interleave", f"{found}, {words[neighbours]} belong so by {origin}")
            return


def _angle_faults(model: nn.Module, rope: RopeOfConfig, origin: str) -> Iterator[LoadFault]:
    in_tables = 1.0
    for _, _, buffer in _tables(model):
        table = _whole(buffer)
        if table is not None and rope.is_stretched(table):
            in_tables = rope.stretch
        right = rope.table_like(table) if table is not None else None
        # At position 0 nothing turns: a table must go on to position 1.
        if table is None or right is None or table.is_meta or table.shape[0] < 2:
            continue
        found, expected = _first_turn(table.cpu()), _first_turn(right)
        apart = (found - expected).abs() > _RELATIVE * expected.abs() + 1e-12
        if apart.any():
            at = int(apart.int().argmax())
            words = f"pair {at} turns by {found[at].item():g} a position, {expected[at].item():g} in {origin}"
            yield LoadFault("rope-differs", "rope_parameters", words)
            return
    for where, part in model.named_modules():
        scale = getattr(part, "softmax_scale", None)
        # Such a table multiplies queries and keys, so their products twice.
        if isinstance(scale, float) and rope.scale is not None and not _same(scale * in_tables**2, rope.scale):
            here = f"attention is scaled by {scale * in_tables**2:g} in the trainer ({where})"
            words = f"{here}, by {rope.scale:g} in {origin}"
            yield LoadFault("rope-differs", "rope_mscale", words)
            return


def _whole(table: Tensor) -> Tensor | None:
    """A table as a plain tensor; None if this rank has a part of it. 0.3 keeps it on the mesh of tensor parallelism."""
    if not isinstance(table, DTensor):
        return table
    local: Tensor = table.to_local()
    return local if local.shape == table.shape else None


def _first_turn(table: Tensor) -> Tensor:
    """The angle of each pair at position 1."""
    if table.is_complex():
        return table[1].angle()
    half = table.shape[1] // 2
    # Both halves have the same angles: one of them is enough.
    return torch.atan2(table[1, half:], table[1, :half])[: half // 2]


def _tables(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    transient = set(non_persistent_buffers(model))
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            named = clean_fqn(f"{path}.{name}" if path else name, model)
            if name in _TABLES and buffer is not None and buffer.dim() == 2 and named in transient:
                yield module, name, buffer


def _same(found: Any, expected: Any) -> bool:
    if isinstance(found, bool | str) or isinstance(expected, bool | str):
        return bool(found == expected)
    return math.isclose(float(found), float(expected), rel_tol=1e-9)
