"""A loop of one's own on accelerate with Shardsmith attached.

    torchrun --nproc_per_node=2 examples/accelerate_loop.py --directory accelerate-run --steps 100

Kill it at any moment and start it again: it goes on from the last folder that is complete. On CPU the ranks are DDP's;
on accelerators, FSDP2's. The model, its tokenizer and the text are those of fsdp2_loop.py.
"""

from __future__ import annotations

import argparse
import signal
from pathlib import Path

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import set_seed
from fsdp2_loop import evaluate, prepare, sample
from transformers import AutoModelForCausalLM, AutoTokenizer, Olmo2Config

from shardsmith.hooks import EMA, HFExport, Hooks, every, finish, last
from shardsmith.integrations.accelerate import attach, last_checkpoint

ACCUMULATION = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("accelerate-run"), help="where everything is written")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps")
    given = parser.parse_args()
    on_accelerator = torch.accelerator.is_available()
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
    accelerator = Accelerator(
        cpu=not on_accelerator,
        fsdp_plugin=plugin if on_accelerator else None,
        gradient_accumulation_steps=ACCUMULATION,
    )
    with accelerator.main_process_first():
        prepare(given.directory)
    tokens = torch.load(given.directory / "tokens.pt", weights_only=True)
    set_seed(0)
    model = AutoModelForCausalLM.from_config(Olmo2Config.from_pretrained(given.directory / "base"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model, optimizer = accelerator.prepare(model, optimizer)

    ema = EMA(model, decay=0.98)
    tokenizer = AutoTokenizer.from_pretrained(given.directory / "base")
    export = HFExport(given.directory / "hf", model=model, ema=ema, processor=tokenizer, when=every(25) | last())
    hooks = Hooks(ema, export, stop_on=signal.SIGTERM)
    attach(accelerator, hooks)

    if (folder := last_checkpoint(given.directory / "states")) is not None:
        accelerator.load_state(folder)
    step = hooks.resume()
    while step < given.steps and not hooks.should_stop:
        for part in range(ACCUMULATION):
            number = (step * ACCUMULATION + part) * accelerator.num_processes + accelerator.process_index
            batch = sample(tokens["train"], number).to(accelerator.device)
            with accelerator.accumulate(model):
                accelerator.backward(model(input_ids=batch, labels=batch).loss)
                optimizer.step()
                optimizer.zero_grad()
        step += 1
        hooks.step(step)
        if step % 10 == 0 or hooks.should_stop:
            accelerator.save_state(str(given.directory / "states" / f"step-{step}"))

    test = tokens["test"].to(accelerator.device)
    losses = {"main": evaluate(model, test)}
    with ema.swapped_in():
        losses["ema"] = evaluate(model, test)
    hooks.close()
    accelerator.print(f"evaluation loss: main {losses['main']:.6f}, ema {losses['ema']:.6f}")
    finish()
    accelerator.end_training()


if __name__ == "__main__":
    main()
