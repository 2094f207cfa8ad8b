"""The checkpoint to be converted: a float32 Llama, sharded by FSDP2, saved by real ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, LlamaConfig

from shardsmith.ground.ranks import Ranks
from shardsmith.run_state.contents import Contents
from shardsmith.run_state.save import SaveInProgress


def config_of(parameters: int) -> LlamaConfig:
    """A Llama of about that many parameters, by its number of layers."""
    hidden, inner, vocabulary = (2048, 5632, 32000) if parameters >= 250_000_000 else (512, 1408, 8000)
    # Two embeddings, and for each layer four square projections and three of the feed-forward part.
    layers = round((parameters - 2 * vocabulary * hidden) / (4 * hidden**2 + 3 * hidden * inner))
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=max(1, layers),
        num_attention_heads=hidden // 64,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )


def sharded_llama(parameters: int) -> nn.Module:
    """A float32 Llama of about that many parameters, sharded over all ranks by FSDP2, with random weights."""
    # On the meta device, so that no rank ever holds a whole model.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(parameters))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))  # also where there are GPUs
    for layer in [*model.model.layers, model]:
        fully_shard(layer, mesh=mesh)
    model.to_empty(device="cpu")
    # Other numbers on each rank, so that no two shards are equal.
    generator = torch.Generator().manual_seed(dist.get_rank())
    for parameter in model.parameters():
        parameter.data.to_local().normal_(std=0.02, generator=generator)
    return model


def save_llama(rank: int, folder: Path, checkpoint: Path, base: Path, parameters: int) -> dict[str, Any]:  # noqa: ARG001
    """Save the checkpoint to be converted, and the config beside it. A rank's body; the bytes of its largest tensor."""
    model = sharded_llama(parameters)
    # nested and without anything beside the model: the only form that every tool here can read
    contents = Contents(step=0, state_dict={"model": get_model_state_dict(model)})
    save = SaveInProgress(checkpoint, Ranks())
    save.begin(lambda: contents)
    save.write()
    save.commit()
    if rank == 0:
        config_of(parameters).save_pretrained(base)
    return {"largest_tensor": max(parameter.nbytes for parameter in model.parameters())}
