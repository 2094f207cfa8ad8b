"""Small models of three kinds, trained a few steps by real ranks, with what their checkpoints must give back."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from shardsmith.hooks import EMA, Hooks, ShardedSave, at

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

STEP = 3
SIZES = {
    "vocab_size": 103,
    "hidden_size": 36,  # 2 and 4 ranks get uneven shards of 103 and 36 rows
    "intermediate_size": 50,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
FROM_TRANSFORMERS = ("llama", "qwen2")
TOKENS = torch.arange(24).view(2, 12) * 4


class Odd(nn.Module):
    """What transformers has no model for: a frozen weight, a row fewer than ranks, buffers that are no floats."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(103, 7)
        self.row = nn.Linear(7, 1)
        self.frozen = nn.Linear(7, 5).requires_grad_(False)
        self.register_buffer("seen", torch.tensor(2**40 + 1))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("mean", torch.randn(3, dtype=torch.float64))
        self.register_buffer("nothing", torch.empty(0, 4))
        self.register_buffer("angles", torch.randn(4), persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.row(self.embed(input_ids)) + self.frozen(self.embed(input_ids)).sum()


@dataclass(frozen=True, slots=True)
class Trained:
    """A run that has ended. The state dicts are those of the live model, gathered: name -> whole tensor."""

    checkpoint: Path
    base: Path
    main: dict[str, Tensor]
    ema: dict[str, Tensor]

    @property
    def plain(self) -> dict[str, Path]:
        """What a plain ``dcp.save`` made of the same model: ``flat``, and ``nested`` with the optimizer beside it."""
        return {name: self.checkpoint.parent.with_name(f"dcp-{name}") for name in ("flat", "nested")}


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "odd":
        return Odd()
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config_of(kind))


def config_of(kind: str) -> PreTrainedConfig:
    """A llama with untied embeddings, or a qwen2 with tied ones."""
    from transformers import LlamaConfig, Qwen2Config  # takes seconds, which ranks without such a model need not spend

    if kind == "llama":
        return LlamaConfig(**SIZES, tie_word_embeddings=False, architectures=["LlamaForCausalLM"], dtype="float32")
    return Qwen2Config(**SIZES, tie_word_embeddings=True, architectures=["Qwen2ForCausalLM"], dtype="float32")


def run_training(kinds: tuple[str, ...], directory: Path) -> None:
    """Train, average, save and keep the truth. Each rank calls it; without ``torch.distributed`` nothing is sharded."""
    for kind in kinds:
        train(kind, directory / kind)


def train(kind: str, run: Path) -> None:
    model = build(kind)
    if dist.is_initialized():
        for module in [*getattr(getattr(model, "model", None), "layers", ()), model]:
            fully_shard(module)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ema = EMA(model, decay=0.5)
    hooks = Hooks(ema, ShardedSave(run / "steps", model=model, optimizer=optimizer, ema=ema, when=at(STEP)))
    for step in range(hooks.resume() + 1, STEP + 1):
        output = model(input_ids=TOKENS)
        (output if isinstance(output, Tensor) else output.logits).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        hooks.step(step)
    hooks.close()
    main = get_model_state_dict(model)
    if dist.is_initialized():
        dcp.save(main, checkpoint_id=run / "dcp-flat")
        dcp.save({"model": main, "optim": optimizer.state_dict()["state"]}, checkpoint_id=run / "dcp-nested")
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    averages = {name: gathered(tensor) for name, tensor in ema.state_dict()["model"].items()}
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save({"main": whole, "ema": averages}, run / "truth.pt")


def gathered(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def read_run(kind: str, directory: Path) -> Trained:
    """A run that ``run_training`` made; what the average does not cover is what main says."""
    truth = torch.load(directory / kind / "truth.pt", weights_only=True)
    averages = truth["ema"]
    if kind == "qwen2":
        averages["lm_head.weight"] = averages["model.embed_tokens.weight"]
    run = directory / kind
    return Trained(run / "steps" / f"step-{STEP}", run.parent / f"base-{kind}", truth["main"], truth["main"] | averages)


def make_base(kind: str, base: Path) -> Path:
    """What a user has of the original model: config, tokenizer and more, and files that an export must not take."""
    base.mkdir(parents=True)
    if kind in FROM_TRANSFORMERS:
        config_of(kind).save_pretrained(base)
    else:
        (base / "config.json").write_text('{"model_type": "odd", "architectures": ["Odd"]}')
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "assets/notes.txt"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(f"{name} of {kind}")
    (base / "generation_config.json").write_text('{"do_sample": false}')
    save_file({"decoder": torch.arange(5.0)}, base / "ae.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("pytorch_model.bin", "modeling_odd.py", ".gitattributes", "tf_model.h5", "assets/code.py"):
        (base / name).write_text("not to be copied")
    return base


def logits_of(kind: str, state: dict[str, Tensor]) -> Tensor:
    """What the live model with these weights answers."""
    model = build(kind)
    model.load_state_dict(state)
    return answers(model)


def loaded_logits(directory: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    """What a model answers that ``from_pretrained`` makes of a directory."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return answers(model)


@torch.no_grad()
def answers(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=TOKENS).logits
