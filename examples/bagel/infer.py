"""Load a directory as BAGEL's inference does: a model on meta, filled from one file, with nothing made up.

python examples/bagel/infer.py bagel-run/hf-6
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from model import build, read_sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--weights", default="ema.safetensors")
    options = parser.parse_args()
    sizes = read_sizes(options.directory)
    with init_empty_weights():
        model = build(sizes)
    weights = options.directory / options.weights
    model = load_checkpoint_and_dispatch(model, str(weights), device_map={"": "cpu"}, dtype=torch.bfloat16)
    left = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if left:
        raise SystemExit(f"{len(left)} tensors are still on meta: {', '.join(left)}")
    tokens, patches = torch.arange(5), torch.zeros(4, 3 * sizes.patch**2, dtype=torch.bfloat16)
    latents, time = torch.zeros(6, sizes.latent_dim, dtype=torch.bfloat16), torch.zeros(6, dtype=torch.bfloat16)
    with torch.no_grad():
        logits, velocity = model(tokens, patches, latents, time)
    print(
        f"{weights}: {len(model.state_dict())} tensors, none on meta; logits {tuple(logits.shape)}, "
        f"velocities {tuple(velocity.shape)}, finite: {bool(logits.isfinite().all() and velocity.isfinite().all())}"
    )


if __name__ == "__main__":
    main()
