"""What the comparison with BAGEL's way needs: the checkpoint, and, under torchrun, the conversion that gathers.

python -m torch.distributed.run --nproc_per_node=4 -m benchmarks.bagel_contender ...
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from examples.bagel.model import FULL_SIZE, WRAPPED, Sizes, build, read_sizes, write_configs

MODELS = ("model", "ema")


def sizes_of(parameters: int) -> Sizes:
    """BAGEL, a half to a sixteenth as wide, with as many layers as make about that many parameters."""
    # Least number of parameters -> divisor of the widths, and numbers of heads that divide what is left.
    widths = {500_000_000: (2, 14, 2, 8), 100_000_000: (4, 7, 1, 4), 0: (16, 7, 1, 4)}
    part, heads, kv_heads, vit_heads = next(width for least, width in widths.items() if parameters >= least)
    narrow = {
        name: getattr(FULL_SIZE, name) // part for name in ("vocab", "hidden", "inner", "vit_hidden", "vit_inner")
    }
    sizes = replace(FULL_SIZE, **narrow, heads=heads, kv_heads=kv_heads, vit_heads=vit_heads, layers=1)
    # Two sizes give the parameters of a layer, and what there is besides.
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
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))  # also where there are GPUs
    # Inner modules first: ``fully_shard`` of an outer one takes what no inner one has.
    for module in [*(part for part in reversed(list(model.modules())) if type(part) in WRAPPED), model]:
        fully_shard(module, mesh=mesh)
    return model.to_empty(device="cpu")


def make(rank: int, folder: Path, checkpoint: Path, base: Path, parameters: int) -> dict[str, Any]:  # noqa: ARG001
    """Save random weights and an average, one after the other, and the configs of a base model.

    A rank's body, which has nothing to return.
    """
    sizes = sizes_of(parameters)
    for seed, stem in enumerate(MODELS):
        # Another seed for each rank and model, so that no two shards are equal.
        generator = torch.Generator().manual_seed(10 * rank + seed)
        model = sharded(sizes)
        for parameter in model.parameters():
            parameter.data.to_local().normal_(std=0.02, generator=generator)
        dcp.save(get_model_state_dict(model), checkpoint_id=checkpoint / f"{stem}_sharded")
        del model
        # Before the next model is made: both at once would double the memory.
        gc.collect()
    if rank == 0:
        facts = {"train_steps": 1, "world_size": dist.get_world_size(), "checkpoint_type": "sharded", "has_ema": True}
        (checkpoint / "metadata.json").write_text(json.dumps(facts))
        write_configs(sizes, base)
    return {}


def gather(options: argparse.Namespace) -> None:
    """One model after the other: load its shards, gather all of it on rank 0, cast, save; copy the configs.

    Kind to memory: shards go before anything is cast, and each tensor goes as soon as it is cast.
    """
    sizes = read_sizes(options.base_model_path)
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    if dist.get_rank() == 0:
        shutil.copytree(options.base_model_path, options.output_dir)
    for stem in MODELS:
        model = sharded(sizes)
        state = get_model_state_dict(model)
        dcp.load(state, checkpoint_id=options.checkpoint_dir / f"{stem}_sharded")
        full = get_model_state_dict(model, options=whole)
        del model, state
        gc.collect()
        if dist.get_rank() == 0:
            rounded = {fqn: full.pop(fqn).bfloat16().contiguous() for fqn in list(full)}
            save_file(rounded, options.output_dir / f"{stem}.safetensors")
            del rounded
        dist.barrier()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for place in ("checkpoint_dir", "output_dir", "base_model_path"):
        parser.add_argument(f"--{place}", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    gather(chosen)
    dist.destroy_process_group()
