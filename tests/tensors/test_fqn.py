from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from shardsmith.tensors.fqn import clean_fqn, non_persistent_buffers, tied_weights
from tests.ranks import run_on_ranks

TIES = {
    "head.weight": "embed.weight",
    "again.linear.weight": "block.linear.weight",
    "again.linear.bias": "block.linear.bias",
}


class Block(nn.Module):
    """A linear layer with one buffer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("inv_freq", torch.ones(2), persistent=False)


class Tied(nn.Module):
    """Has a tied weight, a module under two names, and a part of its own that is called ``module``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.block = Block()
        self.again = nn.ModuleDict({"linear": self.block.linear})
        self.module = nn.Linear(4, 4, bias=False)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("layers.0.weight", "layers.0.weight"),
        ("_orig_mod.layers.0.weight", "layers.0.weight"),
        ("_fsdp_wrapped_module.layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.weight", "layers.0.weight"),
        # without a model nobody knows whose "module" it is
        ("module.layers.weight", "module.layers.weight"),
        # only whole segments are a wrapper's
        ("my_orig_mod.weight", "my_orig_mod.weight"),
    ],
)
def test_wrapper_segments_are_left_out(name: str, clean: str) -> None:
    assert clean_fqn(name) == clean
    assert clean_fqn(clean) == clean


def test_one_name_is_kept_for_each_tensor() -> None:
    assert tied_weights(Tied()) == TIES


def test_transient_buffers_are_listed_and_are_no_ties() -> None:
    model = nn.ModuleList([Block(), Block()])
    model[1].inv_freq = model[0].inv_freq
    model[1].mean = model[0].mean
    assert non_persistent_buffers(model) == ["0.inv_freq", "1.inv_freq"]
    assert tied_weights(model) == {"1.mean": "0.mean"}


def test_compile_and_activation_checkpointing_change_no_name() -> None:
    model = Tied()
    model.block = checkpoint_wrapper(model.block)
    model = torch.compile(model)
    assert {clean_fqn(name, model) for name, _ in model.named_parameters()} == {n for n, _ in Tied().named_parameters()}
    assert tied_weights(model) == TIES
    assert non_persistent_buffers(model) == ["block.inv_freq"]


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_transformers_models_keep_the_names_that_save_pretrained_writes(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    if kind == "llama":
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = transformers.LlamaConfig(vocab_size=16, tie_word_embeddings=True, **sizes)
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
        model = transformers.T5ForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        written = set(file.keys())
    ties = tied_weights(nn.ModuleDict({"part": torch.compile(model)}))
    assert ties
    assert {f"part.{name}" for name in model.state_dict()} - ties.keys() == {f"part.{name}" for name in written}


def run_wrapped() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    policy = ModuleWrapPolicy({Block})
    wrapped = [
        fully_shard(Tied(), mesh=mesh),
        DistributedDataParallel(torch.compile(Tied())),
        torch.compile(DistributedDataParallel(Tied())),
        FullyShardedDataParallel(Tied(), auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")),
    ]
    for model in wrapped:
        names = {clean_fqn(name, model) for name, _ in model.named_parameters(remove_duplicate=False)}
        assert names | {"block.mean"} == set(get_model_state_dict(model))
        assert non_persistent_buffers(model) == ["block.inv_freq"]
        assert tied_weights(model).items() >= {"head.weight": "embed.weight"}.items()


def run_wrapped_and_collect() -> None:
    run_wrapped()
    gc.collect()  # FSDP1 modules are cycles that hold the process group; Gloo aborts if they live until exit


def test_names_under_fsdp2_ddp_and_fsdp1_are_those_of_get_model_state_dict(tmp_path: Path) -> None:
    run_on_ranks(run_wrapped_and_collect, 2, tmp_path)
