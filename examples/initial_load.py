"""A run that starts at the wrong loss, and the way out: diagnose, convert, diagnose, train.

The weights of the checkpoint are right, every name is there, and still the loss is too high: the model was made on the
meta device, and what no state dict holds, the frequencies of its rotary positions, was left at zero. Prints what the
commands print, and a table of checks; exits with 1 if any check fails.

    python examples/initial_load.py --run initial-run
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import logging
import shutil
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Olmo2Config, Olmo2ForCausalLM

from shardsmith.cli import main as command_line
from shardsmith.errors import InitialLoadError
from shardsmith.hooks import Hooks, InitialLoad, ShardedSave, last

TEXT = torch.tensor(list("\n".join(inspect.getsource(m) for m in (argparse, inspect, logging)).encode()))
LENGTH = 96
console = Console(highlight=False, soft_wrap=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("initial-run"), help="where everything is written; made anew")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of the model that is to be found")
    arguments = parser.parse_args()
    run: Path = arguments.run
    shutil.rmtree(run, ignore_errors=True)
    checks = follow_the_guide(run, run / "model", arguments.steps)
    table = Table("check", "found", "")
    for name, found, passed in checks:
        table.add_row(name, found, "[green]ok" if passed else "[red]FAILED")
    console.print(table)
    return 0 if all(passed for _, _, passed in checks) else 1


def follow_the_guide(run: Path, model_directory: Path, steps: int) -> list[tuple[str, str, bool]]:
    """The whole story; what was to be seen on the way."""
    say("A model that somebody trained, as a Hugging Face directory")
    pretrain(model_directory, steps)
    right = loss_of(AutoModelForCausalLM.from_pretrained(model_directory))
    console.print(f"its loss on the first batch: {right:.4f}")

    say("A checkpoint, made the old way, and a trainer that starts from it")
    old = old_conversion(model_directory, run / "old")
    model = from_meta(model_directory)
    load_plainly(model, old)
    wrong = loss_of(model)
    console.print(f"every name was loaded, and the loss is {wrong:.4f}")
    save_file({name: buffer.clone() for name, buffer in model.named_buffers()}, run / "buffers.safetensors")

    say("Diagnose")
    reported = ["--buffers", str(run / "buffers.safetensors"), "--reference-loss", f"{wrong:.4f}"]
    batch = ["--batch", str(run / "batch.safetensors")]
    save_file({"input_ids": first_batch()}, run / "batch.safetensors")
    first, printed = shardsmith("diagnose", "--checkpoint", old, "--base-model", model_directory, *batch, *reported)

    say("Convert")
    new = run / "checkpoint"
    converted, summary = shardsmith("to-dcp", "--base-model", model_directory, "--output-dir", new)

    say("Diagnose again")
    again, verdict = shardsmith("diagnose", "--checkpoint", new, "--base-model", model_directory, *batch)

    say("Train")
    refused = refusal(from_meta(model_directory), new)
    console.print(refused, markup=False)
    start, end = train(run, model_directory, new)
    console.print(f"starts at {start:.4f}, is at {end:.4f} after 20 steps")
    return [
        ("zeroed positions cost loss", f"{wrong:.4f} for {right:.4f}", wrong > right + 0.05),
        ("diagnose: a finding, and it is the buffer", f"exit code {first}", first == 1 and "buffer-zero" in printed),
        ("diagnose: the weights are fine", "no finding about them", "not-loaded" not in printed),
        ("to-dcp: complete", f"exit code {converted}", converted == 0 and "complete: every count" in summary),
        ("diagnose of the new checkpoint: clean", f"exit code {again}", again == 0 and "buffer-zero" not in verdict),
        ("a load that nobody repairs is refused", "buffer-zero", "buffer-zero" in refused),
        ("starts at the loss of the original", f"{start - right:+.1e}", abs(start - right) < 1e-5),
        ("and trains", f"{start:.4f} -> {end:.4f}", end < start),
    ]


def from_meta(model_directory: Path) -> Olmo2ForCausalLM:
    """A model as trainers make it: without weights first, then with memory for them. Its buffers are left at zero."""
    config = Olmo2Config.from_pretrained(model_directory)
    with torch.device("meta"):
        model = Olmo2ForCausalLM(config)
    model.to_empty(device="cpu")
    for buffer in model.buffers():
        buffer.zero_()  # as fresh memory is, most of the time
    return model


def train(run: Path, model_directory: Path, checkpoint: Path, steps: int = 20) -> tuple[float, float]:
    """Start from the checkpoint, verified, and train a little; the loss before and after."""
    model = from_meta(model_directory)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    load = InitialLoad(checkpoint, model=model, repair_buffers=True)
    save = ShardedSave(run / "steps", model=model, optimizer=optimizer, when=last())
    hooks = Hooks(load, save)
    step = hooks.resume()
    if load.report is not None:
        console.print(load.report.summary, markup=False)
    start = loss_of(model)
    while step < steps:
        model(input_ids=first_batch(), labels=first_batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        hooks.step(step)
    hooks.close()
    return start, loss_of(model)


def refusal(model: Olmo2ForCausalLM, checkpoint: Path) -> str:
    """What a load says that may not repair anything."""
    try:
        Hooks(InitialLoad(checkpoint, model=model)).resume()
    except InitialLoadError as error:
        return str(error)
    return "it was not refused"


def pretrain(directory: Path, steps: int) -> None:
    """A small OLMo-2 that has learnt to spell Python's own source."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 256}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = Olmo2ForCausalLM(Olmo2Config(**sizes, **heads, **ends, rope_theta=500_000.0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        starts = torch.randint(LENGTH, len(TEXT) - LENGTH, (8,), generator=torch.Generator().manual_seed(step))
        tokens = torch.stack([TEXT[start : start + LENGTH] for start in starts])
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)


def old_conversion(model_directory: Path, checkpoint: Path) -> Path:
    """from_pretrained and dcp.save: the weights in it are right."""
    model = AutoModelForCausalLM.from_pretrained(model_directory)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(model.state_dict(), checkpoint_id=checkpoint)
    return checkpoint


def load_plainly(model: Olmo2ForCausalLM, checkpoint: Path) -> None:
    """dcp.load, as a trainer does it. Nothing is missing, and nothing is said."""
    state = model.state_dict()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(state, checkpoint_id=checkpoint)
    model.load_state_dict(state)


def first_batch() -> Tensor:
    return TEXT[: 8 * LENGTH].view(8, LENGTH)


@torch.no_grad()
def loss_of(model: Olmo2ForCausalLM) -> float:
    return float(model(input_ids=first_batch(), labels=first_batch()).loss)


def shardsmith(*arguments: str | Path) -> tuple[int, str]:
    """Run a command, in this process, which has imported torch already; its exit code and what it printed."""
    words = [str(argument) for argument in arguments]
    console.print(f"$ shardsmith {' '.join(words)}")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = command_line(words)
    console.print(printed.getvalue(), markup=False)
    return code, printed.getvalue()


def say(text: str) -> None:
    console.rule(f"[bold]{text}", align="left")


if __name__ == "__main__":
    sys.exit(main())
