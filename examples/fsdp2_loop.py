"""A small OLMo-2 learns Python from the standard library's own source, under FSDP2, with Shardsmith attached.

    torchrun --nproc_per_node=2 examples/fsdp2_loop.py --directory demo-run --steps 200

Kill it at any moment and start it again: it goes on from its last checkpoint. Told to end (SIGTERM, Ctrl-C) it saves
the step that it is at, and goes on from there. It runs on CPU (Gloo). Everything that it needs it makes itself: the
text is on every machine that has Python, and the tokenizer is trained on it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sysconfig
from pathlib import Path

import torch
import torch.distributed as dist
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, Olmo2Config, PreTrainedTokenizerFast

from shardsmith.hooks import EMA, HFExport, Hooks, ShardedSave, every, finish, last, latest

SEQUENCE = 128
BATCH = 8  # sequences a rank and step


def train(run: Path, steps: int, place: str | Path) -> None:
    """Train to ``steps``, from the last checkpoint in ``place`` if there is one. All ranks call it."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    tokens = torch.load(run / "tokens.pt", weights_only=True)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Olmo2Config.from_pretrained(run / "base"))
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    ema = EMA(model, decay=0.98)
    save = ShardedSave(
        f"{place}/checkpoints", model=model, optimizer=optimizer, ema=ema, when=every(25) | last(), keep=latest(3)
    )
    export = HFExport(
        f"{place}/hf", model=model, ema=ema, ema_as="directory", base_model=run / "base", when=every(100) | last()
    )
    hooks = Hooks(ema, save, export, stop_on=[signal.SIGTERM, signal.SIGINT])

    step = hooks.resume()
    if rank == 0 and step:
        print(f"resumed at step {step}", flush=True)
    while step < steps and not hooks.should_stop:
        batch = sample(tokens["train"], step * world_size + rank)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        hooks.step(step)
        if rank == 0 and step % 10 == 0:
            print(f"step {step}  loss {loss.item():.3f}", flush=True)

    if hooks.should_stop:
        hooks.close()
        if rank == 0:
            print(f"stopped after step {step}", flush=True)
        return
    losses = {"main": evaluate(model, tokens["test"])}
    with ema.swapped_in():
        losses["ema"] = evaluate(model, tokens["test"])
    hooks.close()
    if rank == 0:
        print(f"evaluation loss: main {losses['main']:.6f}, ema {losses['ema']:.6f}", flush=True)
        (run / "evaluation.json").write_text(json.dumps({"step": step, **losses}))


@torch.no_grad()
def evaluate(model: nn.Module, batch: Tensor) -> float:
    """Mean loss on the held-out batch, which every rank has whole."""
    return model(input_ids=batch, labels=batch).loss.item()


def sample(tokens: Tensor, seed: int) -> Tensor:
    """A batch that depends on the seed alone, so that a resumed run sees what the uninterrupted one would."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - SEQUENCE, (BATCH,), generator=generator)
    return torch.stack([tokens[start : start + SEQUENCE] for start in starts.tolist()])


def prepare(run: Path) -> None:
    """Make what a user would already have: a base model directory (config and tokenizer) and a tokenized text."""
    if (run / "tokens.pt").exists():
        return
    run.mkdir(parents=True, exist_ok=True)
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in sources]
    tokenizer = train_tokenizer(texts)
    tokenizer.save_pretrained(run / "base")
    config = Olmo2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=SEQUENCE,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
        architectures=["Olmo2ForCausalLM"],
    )
    config.save_pretrained(run / "base")
    ids = [tokenizer(text)["input_ids"] for text in texts]
    stream = torch.tensor([token for text in ids for token in [*text, tokenizer.eos_token_id]])
    held_out = BATCH * SEQUENCE
    tokens = {"train": stream[:-held_out].clone(), "test": stream[-held_out:].view(BATCH, SEQUENCE).clone()}
    torch.save(tokens, run / "tokens.tmp")
    (run / "tokens.tmp").rename(run / "tokens.pt")


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 2048 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|pad|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2048, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0], pad_token=special[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("demo-run"), help="where everything is written")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    parser.add_argument(
        "--store", help="checkpoints and exports go there, such as s3://bucket/run; the directory is then a rank's own"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // int(os.environ.get("WORLD_SIZE", "1"))))
    dist.init_process_group("gloo")
    if dist.get_rank() == 0 or arguments.store:
        prepare(arguments.directory)
    dist.barrier()
    train(arguments.directory, arguments.steps, arguments.store or arguments.directory)
    finish()


if __name__ == "__main__":
    main()
