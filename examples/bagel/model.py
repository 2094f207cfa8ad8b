"""A small model that is built like BAGEL: the same parts under the same names, a thousandth of the size.

A language model whose layers have every weight twice (one for text and image understanding, its ``_moe_gen`` twin for
generation), a SigLIP-like tower whose patch embedding is turned from a convolution into a linear layer, a connector, a
time embedder, projections from and to the latents of a VAE, and two fixed sin-cos position embeddings.

As there, the whole is a PreTrainedModel that is composed of others, and its config holds a dataclass.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Sizes:
    """Of all parts. The defaults make some 39 000 parameters; real BAGEL is in ``FULL_SIZE``."""

    vocab: int = 89
    hidden: int = 28
    inner: int = 36
    layers: int = 2
    heads: int = 2
    kv_heads: int = 1
    vit_hidden: int = 20
    vit_inner: int = 24
    vit_layers: int = 3
    """As vit_config.json says it. The model has one less: the last layer is never used."""
    vit_heads: int = 2
    patch: int = 4
    vit_side: int = 6
    latent_dim: int = 8
    latent_side: int = 4
    time_dim: int = 16

    @property
    def head_dim(self) -> int:
        """Of the language model."""
        return self.hidden // self.heads


FULL_SIZE = Sizes(
    vocab=152064,
    hidden=3584,
    inner=18944,
    layers=28,
    heads=28,
    kv_heads=4,
    vit_hidden=1152,
    vit_inner=4304,
    vit_layers=27,
    vit_heads=16,
    patch=14,
    vit_side=70,
    latent_dim=64,
    latent_side=64,
    time_dim=256,
)


@dataclass
class AutoEncoderParams:
    """Of the VAE, which is not trained."""

    z_channels: int = 16
    downsample: int = 8


class LanguageConfig(PreTrainedConfig):
    """Of the language model: ``sizes`` has the fields of ``Sizes``."""

    model_type = "bagel_small_llm"
    sizes: dict[str, int] | None = None


class VisionConfig(PreTrainedConfig):
    """Of the vision tower."""

    model_type = "bagel_small_vit"
    sizes: dict[str, int] | None = None


class BagelConfig(PreTrainedConfig):
    """Of the whole: the configs of its parts."""

    model_type = "bagel"

    def __init__(
        self,
        llm_config: LanguageConfig | None = None,
        vit_config: VisionConfig | None = None,
        vae_config: AutoEncoderParams | None = None,
        **rest: object,
    ) -> None:
        super().__init__(**rest)
        self.llm_config, self.vit_config, self.vae_config = llm_config, vit_config, vae_config


class RMSNorm(nn.Module):
    """With a weight and no bias."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight, 1e-6)


class MLP(nn.Module):
    """Gated, without biases."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(sizes.hidden, sizes.inner, bias=False)
        self.up_proj = nn.Linear(sizes.hidden, sizes.inner, bias=False)
        self.down_proj = nn.Linear(sizes.inner, sizes.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class MoTAttention(nn.Module):
    """Attention over one sequence, in which each token goes through the weights of its kind."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        kv = sizes.kv_heads * sizes.head_dim
        for suffix in ("", "_moe_gen"):
            self.add_module(f"q_proj{suffix}", nn.Linear(sizes.hidden, sizes.heads * sizes.head_dim))
            self.add_module(f"k_proj{suffix}", nn.Linear(sizes.hidden, kv))
            self.add_module(f"v_proj{suffix}", nn.Linear(sizes.hidden, kv))
            self.add_module(f"o_proj{suffix}", nn.Linear(sizes.heads * sizes.head_dim, sizes.hidden, bias=False))
            self.add_module(f"q_norm{suffix}", RMSNorm(sizes.head_dim))
            self.add_module(f"k_norm{suffix}", RMSNorm(sizes.head_dim))

    def forward(self, x: Tensor, split: int, turns: Tensor) -> Tensor:
        q = turned(self._heads(x, split, "q", self.sizes.heads), turns)
        k = turned(self._heads(x, split, "k", self.sizes.kv_heads), turns)
        v = self._both(x, split, "v_proj").unflatten(-1, (self.sizes.kv_heads, -1))
        q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self._both(out[0].transpose(0, 1).flatten(1), split, "o_proj")

    def _heads(self, x: Tensor, split: int, which: str, heads: int) -> Tensor:
        """Queries or keys, (tokens, heads, head_dim), normed head by head."""
        return self._both(self._both(x, split, f"{which}_proj").unflatten(-1, (heads, -1)), split, f"{which}_norm")

    def _both(self, x: Tensor, split: int, name: str) -> Tensor:
        return by_kind(x, split, getattr(self, name), getattr(self, f"{name}_moe_gen"))


class MoTLayer(nn.Module):
    """A layer of the language model, with all weights twice."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.self_attn = MoTAttention(sizes)
        self.mlp, self.mlp_moe_gen = MLP(sizes), MLP(sizes)
        self.input_layernorm, self.input_layernorm_moe_gen = RMSNorm(sizes.hidden), RMSNorm(sizes.hidden)
        self.post_attention_layernorm = RMSNorm(sizes.hidden)
        self.post_attention_layernorm_moe_gen = RMSNorm(sizes.hidden)

    def forward(self, x: Tensor, split: int, turns: Tensor) -> Tensor:
        x = x + self.self_attn(by_kind(x, split, self.input_layernorm, self.input_layernorm_moe_gen), split, turns)
        inner = by_kind(x, split, self.post_attention_layernorm, self.post_attention_layernorm_moe_gen)
        return x + by_kind(inner, split, self.mlp, self.mlp_moe_gen)


class RotaryEmbedding(nn.Module):
    """Angles of the positions. No checkpoint holds ``inv_freq``."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        places = torch.arange(0, head_dim, 2, dtype=torch.float32)
        self.register_buffer("inv_freq", 10000.0 ** -(places / head_dim), persistent=False)

    def forward(self, count: int) -> Tensor:
        return torch.outer(torch.arange(count, device=self.inv_freq.device, dtype=torch.float32), self.inv_freq.float())


class LanguageTrunk(nn.Module):
    """Embeddings, layers and final norms."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(sizes.vocab, sizes.hidden)
        self.layers = nn.ModuleList(MoTLayer(sizes) for _ in range(sizes.layers))
        self.norm, self.norm_moe_gen = RMSNorm(sizes.hidden), RMSNorm(sizes.hidden)
        self.rotary_emb = RotaryEmbedding(sizes.head_dim)


class LanguageModel(PreTrainedModel):
    """The trunk and its head."""

    config_class = LanguageConfig

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__(config)
        sizes = Sizes(**(config.sizes or {}))
        self.model = LanguageTrunk(sizes)
        self.lm_head = nn.Linear(sizes.hidden, sizes.vocab, bias=False)

    def _init_weights(self, module: nn.Module) -> None:
        """As torch has it."""


class SiglipLayer(nn.Module):
    """A layer of the vision tower."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads = sizes.vit_heads
        self.self_attn = nn.ModuleDict(
            {name: nn.Linear(sizes.vit_hidden, sizes.vit_hidden) for name in ("k_proj", "v_proj", "q_proj", "out_proj")}
        )
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(sizes.vit_hidden), nn.LayerNorm(sizes.vit_hidden)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(sizes.vit_hidden, sizes.vit_inner), "fc2": nn.Linear(sizes.vit_inner, sizes.vit_hidden)}
        )

    def forward(self, x: Tensor) -> Tensor:
        normed = self.layer_norm1(x)
        q, k, v = (
            self.self_attn[f"{name}_proj"](normed).unflatten(-1, (self.heads, -1)).transpose(0, 1)[None]
            for name in ("q", "k", "v")
        )
        out = functional.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1).flatten(1)
        x = x + self.self_attn["out_proj"](out)
        return x + self.mlp["fc2"](functional.gelu(self.mlp["fc1"](self.layer_norm2(x)), approximate="tanh"))


class SiglipEmbeddings(nn.Module):
    """Patches to vectors: at first by a convolution, as SigLIP has it."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.patch_embedding: nn.Module = nn.Conv2d(3, sizes.vit_hidden, sizes.patch, stride=sizes.patch)
        self.position_embedding = nn.Embedding(sizes.vit_side**2, sizes.vit_hidden)

    def convert_conv2d_to_linear(self) -> None:
        """Take patches of shape (n, patch * patch * 3), channels last: other order of the same weights."""
        conv = self.patch_embedding
        assert isinstance(conv, nn.Conv2d)
        weight = conv.weight.detach().permute(0, 2, 3, 1).reshape(conv.out_channels, -1)
        linear = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device)
        linear.weight = nn.Parameter(weight.contiguous())
        linear.bias = conv.bias
        self.patch_embedding = linear


class SiglipEncoder(nn.Module):
    """The layers that are used."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SiglipLayer(sizes) for _ in range(sizes.vit_layers - 1))


class SiglipTower(nn.Module):
    """Embeddings, layers, final norm."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embeddings = SiglipEmbeddings(sizes)
        self.encoder = SiglipEncoder(sizes)
        self.post_layernorm = nn.LayerNorm(sizes.vit_hidden)

    def forward(self, patches: Tensor) -> Tensor:
        x = self.embeddings.patch_embedding(patches)
        x = x + self.embeddings.position_embedding(torch.arange(len(patches), device=patches.device))
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x)


class SiglipModel(PreTrainedModel):
    """What SigLIP's checkpoints call ``vision_model``."""

    config_class = VisionConfig

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(config)
        self.vision_model = SiglipTower(Sizes(**(config.sizes or {})))

    def _init_weights(self, module: nn.Module) -> None:
        """As torch has it."""

    def forward(self, patches: Tensor) -> Tensor:
        return self.vision_model(patches)


class Connector(nn.Module):
    """From the vision tower into the language model."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.fc1 = nn.Linear(sizes.vit_hidden, sizes.hidden)
        self.fc2 = nn.Linear(sizes.hidden, sizes.hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))


class TimeEmbedder(nn.Module):
    """A vector for the time of the diffusion."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.time_dim = sizes.time_dim
        self.mlp = nn.Sequential(
            nn.Linear(sizes.time_dim, sizes.hidden), nn.SiLU(), nn.Linear(sizes.hidden, sizes.hidden)
        )

    def forward(self, time: Tensor) -> Tensor:
        half = self.time_dim // 2
        angles = time[:, None] * torch.exp(-math.log(10000) * torch.arange(half, device=time.device) / half)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(time.dtype))


class PositionEmbedding(nn.Module):
    """Fixed sines and cosines of two-dimensional places."""

    def __init__(self, side: int, hidden: int) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(sin_cos(side, hidden), requires_grad=False)

    def forward(self, count: int) -> Tensor:
        # A copy: under FSDP the parameter's memory is given back at the end of this call, and a view would dangle.
        return self.pos_embed[torch.arange(count, device=self.pos_embed.device)]


class Bagel(PreTrainedModel):
    """All of it. It is made of models and cannot be made from its config alone."""

    config_class = BagelConfig

    def __init__(self, language_model: LanguageModel, vit_model: SiglipModel, config: BagelConfig) -> None:
        super().__init__(config)
        sizes = Sizes(**(config.llm_config.sizes or {}))
        self.language_model = language_model
        self.time_embedder = TimeEmbedder(sizes)
        self.vae2llm = nn.Linear(sizes.latent_dim, sizes.hidden)
        self.llm2vae = nn.Linear(sizes.hidden, sizes.latent_dim)
        self.latent_pos_embed = PositionEmbedding(sizes.latent_side, sizes.hidden)
        self.vit_model = vit_model
        self.connector = Connector(sizes)
        self.vit_pos_embed = PositionEmbedding(sizes.vit_side, sizes.hidden)

    def _init_weights(self, module: nn.Module) -> None:
        """As torch has it."""

    def forward(self, tokens: Tensor, patches: Tensor, latents: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the tokens (t, vocab) and velocities of the latents (l, latent_dim) of one packed sequence.

        Args:
            tokens: (t,), int64.
            patches: (p, patch * patch * 3), channels last.
            latents: (l, latent_dim), noisy.
            time: (l,), 0 to 1.
        """
        trunk = self.language_model.model
        image = self.connector(self.vit_model(patches)) + self.vit_pos_embed(len(patches))
        noisy = self.vae2llm(latents) + self.time_embedder(time) + self.latent_pos_embed(len(latents))
        x = torch.cat([image, trunk.embed_tokens(tokens), noisy])
        split, turns = len(image) + len(tokens), trunk.rotary_emb(len(x))
        for layer in trunk.layers:
            x = layer(x, split, turns)
        x = by_kind(x, split, trunk.norm, trunk.norm_moe_gen)
        return self.language_model.lm_head(x[len(image) : split]), self.llm2vae(x[split:])


WRAPPED = {MoTLayer, SiglipLayer, SiglipModel, Connector, TimeEmbedder, PositionEmbedding}
"""Modules that get an FSDP unit of their own, as in BAGEL's training."""


def build(sizes: Sizes) -> Bagel:
    """The model as it is trained and as it infers: with the patch embedding converted."""
    llm, vit = LanguageConfig(sizes=asdict(sizes)), VisionConfig(sizes=asdict(sizes))
    config = BagelConfig(llm, vit, AutoEncoderParams())
    model = Bagel(LanguageModel(llm), SiglipModel(vit), config)
    model.vit_model.vision_model.embeddings.convert_conv2d_to_linear()
    return model


def average_of(model: Bagel) -> Bagel:
    """A second model to be averaged into, before either is wrapped."""
    return copy.deepcopy(model).requires_grad_(False)


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """(tokens, heads, head_dim), each pair turned by its angle at its position."""
    cos, sin = (part.to(x.dtype)[:, None] for part in (angles.cos(), angles.sin()))
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def by_kind(x: Tensor, split: int, understanding: nn.Module, generation: nn.Module) -> Tensor:
    """The first ``split`` tokens through one module, the others through its twin."""
    return torch.cat([understanding(x[:split]), generation(x[split:])])


def sin_cos(side: int, hidden: int) -> Tensor:
    """(side * side, hidden): half of it tells the row, half the column."""
    if torch.empty(0).device.type == "meta":
        return torch.empty(side * side, hidden)
    places = torch.arange(side * side)
    frequencies = 10000.0 ** -(torch.arange(hidden // 4) / (hidden // 4))
    angles = [place[:, None] * frequencies for place in (places // side, places % side)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)


def write_configs(sizes: Sizes, directory: Path) -> None:
    """The three configs that BAGEL's directories have, and the files of a tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    facts = asdict(sizes)
    (directory / "config.json").write_text(json.dumps({"model_type": "bagel", "architectures": ["Bagel"]}))
    llm = {"num_hidden_layers": sizes.layers, "hidden_size": sizes.hidden, "qk_norm": True, "sizes": facts}
    (directory / "llm_config.json").write_text(json.dumps(llm))
    vit = {"num_hidden_layers": sizes.vit_layers, "hidden_size": sizes.vit_hidden, "patch_size": sizes.patch}
    (directory / "vit_config.json").write_text(json.dumps(vit))
    for name in ("generation_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        (directory / name).write_text("{}")
    (directory / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": {}, "merges": []}}))
    (directory / "vocab.json").write_text("{}")
    (directory / "merges.txt").write_text("")


def read_sizes(directory: Path) -> Sizes:
    """Inverse of ``write_configs``."""
    return Sizes(**json.loads((directory / "llm_config.json").read_text())["sizes"])
