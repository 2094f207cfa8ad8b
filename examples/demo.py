"""The main job end to end: train and export on two ranks, be killed, come back, convert, load, compare (``make demo``).

Prints what it does, the files that it leaves, and a table of checks; exits with 1 if any check fails.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.tree import Tree
from torch.distributed import TCPStore
from transformers import AutoModelForCausalLM, AutoTokenizer

from shardsmith.cli import main as command_line

LOOP = Path(__file__).with_name("fsdp2_loop.py")
RANKS = 2
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}

console = Console(highlight=False, soft_wrap=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("demo-run"), help="where everything is written; made anew")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    arguments = parser.parse_args()
    run, steps = arguments.run, arguments.steps
    shutil.rmtree(run, ignore_errors=True)
    began = time.monotonic()
    checks = [*train_with_a_kill(run, steps), *convert_and_load(run, steps)]
    say("What is on disk now")
    console.print(tree_of(run))
    console.print(table_of(checks))
    failed = [name for name, _, passed in checks if not passed]
    console.print(f"{len(checks) - len(failed)} of {len(checks)} checks passed in {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


Check = tuple[str, str, bool]


def names_in(folder: Path) -> list[str]:
    """What is there, but for the note of which steps the run keeps."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".retention.json")


def train_with_a_kill(run: Path, steps: int) -> Iterator[Check]:
    kill_at = steps * 6 // 10
    say(f"Two FSDP2 ranks train a small OLMo-2 on Python's own source; SIGKILL after step {kill_at}")
    lines = train(run, steps, kill_at=kill_at)
    seen = [int(line.split()[1]) for line in lines if line.startswith("step ")]
    left = names_in(run / "checkpoints")
    console.print(f"killed; on disk: {', '.join(left)}")

    say("The same command again")
    lines = train(run, steps)
    resumed = next((int(line.split()[-1]) for line in lines if line.startswith("resumed at step ")), 0)
    left = names_in(run / "checkpoints")
    yield (
        "came back from a checkpoint after the kill",
        f"step {resumed} of {max(seen)}",
        0 < resumed <= max(seen) < steps,
    )
    yield "only complete steps on disk", ", ".join(left), all(name.startswith("step-") for name in left)
    yield "the last step is saved", f"step-{steps}", f"step-{steps}" in left


def convert_and_load(run: Path, steps: int) -> Iterator[Check]:
    checkpoint = run / "checkpoints" / f"step-{steps}"
    say("What the checkpoint holds")
    shardsmith("inspect", str(checkpoint), "--verify")
    in_loop = json.loads((run / "evaluation.json").read_text())
    test = torch.load(run / "tokens.pt", weights_only=True)["test"]
    live = run / "hf" / f"step-{steps}"
    say("What the run itself exported while it trained, in bfloat16")
    for model, directory in (("main", live), ("ema", live.with_name(f"{live.name}-ema"))):
        loss, _ = load(directory, test)
        difference = abs(loss - in_loop[model])
        what = f"{loss:.6f} loaded, {in_loop[model]:.6f} in the loop, differ by {difference:.1e}"
        yield f"{model} exported live: loss as in the loop within 0.02", what, difference <= TOLERANCE["bfloat16"]
    for dtype, tolerance in TOLERANCE.items():
        output = run / "converted" / dtype
        say(f"to-hf in {dtype}: main and EMA, each a directory that from_pretrained loads")
        shardsmith(
            *("to-hf", "--checkpoint", str(checkpoint), "--output-dir", str(output)),
            *("--base-model", str(run / "base"), "--ema-as", "directory", "--dtype", dtype),
        )
        for model, directory in (("main", output), ("ema", output.with_name(f"{dtype}-ema"))):
            loss, completion = load(directory, test)
            difference = abs(loss - in_loop[model])
            what = f"{loss:.6f} loaded, {in_loop[model]:.6f} in the loop, differ by {difference:.1e}"
            yield f"{model} {dtype}: loss as in the loop within {tolerance:g}", what, difference <= tolerance
            yield f"{model} {dtype}: completes a line of Python", repr(completion), len(completion.strip()) > 0
    for suffix in ("", "-ema"):
        names = [f"{live.name}{suffix}", f"bfloat16{suffix}"]
        weights = [live.with_name(names[0]), run / "converted" / names[1]]
        same = filecmp.cmp(*(directory / "model.safetensors" for directory in weights), shallow=False)
        yield "exported live and converted afterwards: the same bytes", " = ".join(names), same


@torch.no_grad()
def load(directory: Path, test: torch.Tensor) -> tuple[float, str]:
    """The loss on the held-out batch, and how the model goes on after a line's beginning."""
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    loss = model(input_ids=test, labels=test).loss.item()
    prompt = tokenizer("    def __init__(self", return_tensors="pt")["input_ids"]
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False)
    return loss, tokenizer.decode(out[0, prompt.shape[1] :])


def train(
    run: Path, steps: int, kill_at: int | None = None, *, ranks: int = RANKS, store_url: str | None = None
) -> list[str]:
    """Run the training loop and return what rank 0 printed; kill all ranks at a step, if one is given.

    With ``store_url`` steps go there, and each rank works in a directory of its own.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # here, as torchrun holds it for its ranks
    common = {
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "OMP_NUM_THREADS": "1",
    }
    own = [run / f"rank-{rank}" if store_url else run for rank in range(ranks)]
    command = [sys.executable, str(LOOP), "--steps", str(steps), *(["--store", store_url] if store_url else [])]
    processes = [
        subprocess.Popen(
            [*command, "--directory", str(own[rank])],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE if rank == 0 else None,
            text=True,
        )
        for rank in range(ranks)
    ]
    lines = []
    output = processes[0].stdout
    assert output is not None
    for line in output:
        console.print(f"  {line.rstrip()}")
        lines.append(line.rstrip())
        if kill_at is not None and line.startswith("step ") and int(line.split()[1]) >= kill_at:
            for process in processes:
                process.send_signal(signal.SIGKILL)
    codes = [process.wait() for process in processes]
    if kill_at is None and any(codes):
        raise SystemExit(f"the training loop failed with exit codes {codes}")
    return lines


def shardsmith(*arguments: str) -> None:
    """Run a command, in this process, which has imported torch already."""
    console.print(f"$ shardsmith {' '.join(arguments)}")
    if code := command_line(arguments):
        raise SystemExit(f"shardsmith {arguments[0]} failed with exit code {code}")


def say(text: str) -> None:
    console.rule(f"[bold]{text}", align="left")


def tree_of(folder: Path) -> Tree:
    tree = Tree(f"{folder.name}/")
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            tree.add(tree_of(path))
        else:
            tree.add(f"{path.name}  [dim]{decimal(path.stat().st_size)}")
    return tree


def table_of(checks: list[Check]) -> Table:
    table = Table("check", "found", "")
    for name, found, passed in checks:
        table.add_row(name, found, "[green]ok" if passed else "[red]FAILED")
    return table


if __name__ == "__main__":
    sys.exit(main())
