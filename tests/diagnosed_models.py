"""Tiny models of three families, trained until they know what comes next, for the faults that are planted into them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FAMILIES = ("olmo2", "llama-tied", "qwen3-moe")
VOCABULARY = 96
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "dtype": "float32",
}
_STEPS = 120
_DOCUMENT = 12


@dataclass(frozen=True, slots=True)
class Specimen:
    """A trained model of a family. Read only."""

    family: str
    base: Path
    """What ``save_pretrained`` made of it, with a tokenizer."""
    state: dict[str, Tensor]
    """Its state dict, under the names in memory."""
    buffers: dict[str, Tensor]
    """Of the live model."""
    batch: Path
    """Tokens that it has not seen, as a trainer would dump them."""
    packed: Path
    """The same, several documents to a sequence, with their positions."""

    def model(self, **changes: Any) -> nn.Module:
        """A live one, perhaps with another config."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(config_of(self.family, **changes))
        model.load_state_dict(self.state)
        return model.eval()


def config_of(family: str, **changes: Any) -> PreTrainedConfig:
    from transformers import LlamaConfig, Olmo2Config, Qwen3MoeConfig

    settings = _SIZES | {"rope_parameters": {"rope_theta": 500_000.0, "rope_type": "default"}}
    if family == "olmo2":
        return Olmo2Config(**settings | {"architectures": ["Olmo2ForCausalLM"]} | changes)
    if family == "llama-tied":
        return LlamaConfig(**settings | {"tie_word_embeddings": True, "architectures": ["LlamaForCausalLM"]} | changes)
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "head_dim": 16,
        "router_aux_loss_coef": 0.05,
    }
    return Qwen3MoeConfig(**settings | experts | {"architectures": ["Qwen3MoeForCausalLM"]} | changes)


def tokens(seed: int, rows: int = 16, length: int = 32) -> Tensor:
    """Sequences whose next token follows from the two before: each adds a number of its own, modulo the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(VOCABULARY, (rows, 1), generator=generator)
    step = torch.randint(1, 8, (rows, 1), generator=generator)
    return (start + step * torch.arange(length)) % VOCABULARY


def train(family: str) -> nn.Module:
    """A few seconds of training on one core."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(family))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    for step in range(_STEPS):
        batch = tokens(step)
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def make_specimen(family: str, directory: Path) -> Specimen:
    """Train one and save what a user would have of it."""
    model = train(family)
    base = directory / "base"
    model.save_pretrained(base)
    make_tokenizer(base)
    batch, packed = directory / "batch.safetensors", directory / "packed.json"
    save_file({"input_ids": tokens(10**6)}, batch)
    rows = torch.cat([tokens(seed, length=_DOCUMENT) for seed in (1, 2, 3)], dim=1)
    positions = torch.arange(_DOCUMENT).repeat(3).expand_as(rows)
    packed.write_text(json.dumps({"input_ids": rows.tolist(), "position_ids": positions.tolist()}))
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return Specimen(family, base, state, buffers, batch, packed)


def make_tokenizer(directory: Path, shift: int = 0) -> Path:
    """A tokenizer of single characters, whose ids can be moved on by some."""
    directory.mkdir(exist_ok=True)
    characters = ["<unk>", *(chr(32 + i) for i in range(VOCABULARY - 1))]
    vocabulary = {token: (i + shift) % VOCABULARY for i, token in enumerate(characters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory
