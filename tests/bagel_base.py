"""A base model like BAGEL's release: configs, a VAE, ema.safetensors, and an index of files that are not there."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from examples.bagel.model import build, write_configs
from tests.legacy_layouts import SIZES

COPIED = {
    "ae.safetensors",
    "config.json",
    "llm_config.json",
    "vit_config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
}
PATCHES = "vit_model.vision_model.embeddings.patch_embedding.weight"


def initial_weights() -> dict[str, Tensor]:
    """Those that the runs of ``legacy_layouts`` began with."""
    torch.manual_seed(3)
    return build(SIZES).state_dict()


def as_conv(linear: Tensor) -> Tensor:
    """The convolution that the linear layer was made of."""
    return linear.view(-1, SIZES.patch, SIZES.patch, 3).permute(0, 3, 1, 2).contiguous()


def make_bagel_base(directory: Path, weights: dict[str, Tensor] | None = None) -> Path:
    """With the weights in bfloat16, as released; by default the ones that training began with."""
    write_configs(SIZES, directory)
    weights = initial_weights() if weights is None else weights
    save_file({name: tensor.bfloat16().contiguous() for name, tensor in weights.items()}, directory / "ema.safetensors")
    save_file({"decoder.conv_in.weight": torch.arange(12.0).view(3, 4)}, directory / "ae.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(weights, "model-00001-of-00003.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def fingerprint(directory: Path) -> dict[str, tuple[str, int, int]]:
    """Content, mode and time of change of everything in a directory."""
    return {
        str(path.relative_to(directory)): (
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
            path.lstat().st_mode,
            path.lstat().st_mtime_ns,
        )
        for path in sorted([directory, *directory.rglob("*")])
    }
