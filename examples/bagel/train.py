"""Train the small BAGEL under FSDP, with its average in a second module, and save sharded checkpoints.

    torchrun --nproc_per_node=2 examples/bagel/train.py --dir bagel-run --steps 6

It makes the base model too, BAGEL-SMALL-MoT, if it is not there, and goes on from the newest checkpoint, if any.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
from pathlib import Path

import torch
import torch.distributed as dist
from model import WRAPPED, Bagel, Sizes, average_of, build, write_configs
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from shardsmith import ShardedCheckpointManager
from shardsmith.hooks import finish

DECAY = 0.9
SIZES = Sizes()


def main() -> None:
    options = parse_options()
    logging.basicConfig(level=logging.INFO if dist.get_rank() == 0 else logging.ERROR, format="%(message)s")
    torch.manual_seed(0)
    whole = build(SIZES)
    if dist.get_rank() == 0 and not options.base.exists():
        make_base(options.base, whole)
    average = wrap(average_of(whole), options.fsdp)
    model = wrap(whole, options.fsdp)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    manager = ShardedCheckpointManager(
        options.dir / "checkpoints",
        model=model,
        optimizer=optimizer,
        ema=average,
        ema_decay=DECAY,
        backend=options.backend,
    )
    step = 0
    if manager.newest_checkpoint() is not None:
        step = manager.load_sharded_checkpoint().step or 0
    while step < options.steps:
        train_step(model, optimizer, step)
        update(average, model)
        manager.average.updates += 1
        step += 1
    manager.save_sharded_checkpoint(step, data_status={"next_batch": step})


def wrap(model: nn.Module, fsdp: int) -> nn.Module:
    """Shard as BAGEL does: a unit for each layer, connector and embedder."""
    if fsdp == 1:
        policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=WRAPPED)
        device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
        return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=device, use_orig_params=True)
    for module in reversed(list(model.modules())):
        if type(module) in WRAPPED:
            fully_shard(module)
    fully_shard(model)
    return model


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Text and image generation on a made-up packed sequence."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(SIZES.vocab, (9,), generator=generator)
    patches = torch.randn(5, 3 * SIZES.patch**2, generator=generator)
    latents = torch.randn(6, SIZES.latent_dim, generator=generator)
    logits, velocity = model(tokens, patches, latents, torch.rand(6, generator=generator))
    loss = nn.functional.cross_entropy(logits[:-1], tokens[1:]) + (velocity - latents).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def update(average: nn.Module, model: nn.Module) -> None:
    """Move the average toward the weights, each rank its own shards, by name."""
    current = dict(model.named_parameters())
    for name, parameter in average.named_parameters():
        if current[name].requires_grad:
            local(parameter).lerp_(local(current[name]), 1 - DECAY)


def local(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's part of it."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter.data


def make_base(directory: Path, model: Bagel) -> None:
    """A directory like BAGEL's release, with the weights that training begins with, an average alone, and a VAE."""
    write_configs(SIZES, directory)
    weights = {name: tensor.bfloat16().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, directory / "ema.safetensors")
    save_file({"decoder.conv_in.weight": torch.zeros(4, 4, 3, 3)}, directory / "ae.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "model-00001-of-00001.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))  # describes what is not there, as theirs


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, default=Path("bagel-run"))
    parser.add_argument("--base", type=Path, default=Path("BAGEL-SMALL-MoT"))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--fsdp", type=int, choices=(1, 2), default=1)
    parser.add_argument("--backend", choices=("dcp", "per_rank"), default="dcp")
    return parser.parse_args()


if __name__ == "__main__":
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    main()
    finish()
