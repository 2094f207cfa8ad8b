"""What the comparison with BAGEL's way needs, under torchrun: the checkpoint, and the conversion that gathers.

python -m torch.distributed.run --nproc_per_node=4 -m benchmarks.bagel_contender make|gather ...
"""

from __future__ import annotations

import argparse
import gc
import shutil
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

from examples.bagel.model import FULL_SIZE, WRAPPED, Sizes, build, read_sizes, write_configs
from shardsmith import ShardedCheckpointManager


def sizes_of(parameters: int) -> Sizes:
    """BAGEL, a half to a sixteenth as wide, with as many layers as make about that many parameters."""
    widths = {500_000_000: (2, 14, 2, 8), 100_000_000: (4, 7, 1, 4), 0: (16, 7, 1, 4)}
    part, heads, kv_heads, vit_heads = next(width for least, width in widths.items() if parameters >= least)
    narrow = {
        name: getattr(FULL_SIZE, name) // part for name in ("vocab", "hidden", "inner", "vit_hidden", "vit_inner")
    }
    sizes = replace(FULL_SIZE, **narrow, heads=heads, kv_heads=kv_heads, vit_heads=vit_heads, layers=1)
    with torch.device("meta"):
        one, two = (
            sum(tensor.numel() for tensor in build(replace(sizes, layers=layers)).state_dict().values())
            for layers in (1, 2)
        )
    return replace(sizes, layers=max(1, round((parameters - one) / (two - one)) + 1))


def sharded(sizes: Sizes) -> nn.Module:
    """The model, sharded over all ranks, with whatever is in its memory."""
    with torch.device("meta"):
        model = build(sizes)
    for module in reversed(list(model.modules())):
        if type(module) in WRAPPED:
            fully_shard(module)
    fully_shard(model)
    return model.to_empty(device="cpu")


def make(options: argparse.Namespace) -> None:
    """Save random weights and an average, and the configs of a base model."""
    sizes = sizes_of(options.parameters)
    models = [sharded(sizes) for _ in range(2)]
    for seed, model in enumerate(models):
        generator = torch.Generator().manual_seed(10 * dist.get_rank() + seed)
        for parameter in model.parameters():
            parameter.data.to_local().normal_(std=0.02, generator=generator)
    folder = options.checkpoint_dir.with_suffix(".run")
    manager = ShardedCheckpointManager(folder, model=models[0], ema=models[1], ema_decay=0.9)
    path = manager.save_sharded_checkpoint(1)
    if dist.get_rank() == 0:
        path.rename(options.checkpoint_dir)
        shutil.rmtree(folder)
        write_configs(sizes, options.base_model_path)


def gather(options: argparse.Namespace) -> None:
    """One model after the other: load its shards, gather all of it on rank 0, cast, save; copy the configs."""
    sizes = read_sizes(options.base_model_path)
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    if dist.get_rank() == 0:
        shutil.copytree(options.base_model_path, options.output_dir)
    for prefix, name in (("", "model"), ("ema_model.", "ema")):
        model = sharded(sizes)
        state = {f"{prefix}{fqn}": tensor for fqn, tensor in get_model_state_dict(model).items()}
        dcp.load(state, checkpoint_id=options.checkpoint_dir)
        full = get_model_state_dict(model, options=whole)
        if dist.get_rank() == 0:
            rounded = {fqn: tensor.bfloat16().contiguous() for fqn, tensor in full.items()}
            save_file(rounded, options.output_dir / f"{name}.safetensors")
        del model, state, full
        gc.collect()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=("make", "gather"))
    parser.add_argument("--parameters", type=int, default=0)
    for place in ("checkpoint_dir", "output_dir", "base_model_path"):
        parser.add_argument(f"--{place}", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    make(chosen) if chosen.action == "make" else gather(chosen)
    dist.destroy_process_group()
