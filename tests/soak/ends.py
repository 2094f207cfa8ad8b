"""Many ends of a training script, interpreter teardown included: of each kind of process group, and of the examples.

python -m tests.soak.ends COUNT [KIND ...] [--bare] runs those of the groups, or of the kinds that are named; ``--bare``
ends groups without ``finish``, to show what it is for.
"""

from __future__ import annotations

import functools
import gc
import importlib
import os
import runpy
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

from shardsmith.hooks import EMA, HFExport, Hooks, ShardedSave, every, finish, last
from tests.hooks.training import adamw, build
from tests.soak.forked import start_ranks, wait_for

GROUPS = ("ddp", "fsdp1", "fsdp2", "accelerate")
PLACE = Path(__file__).parents[2] / "examples"
EXAMPLES = ("fsdp2_loop.py", "accelerate_loop.py", "transformers_trainer.py")
RANKS = 2


def run_script(kind: str, folder: Path, *, bare: bool) -> None:
    """Train two steps, save and export, gather something, end."""
    accelerator: Any = None
    if kind == "accelerate":
        place = {"RANK": dist.get_rank(), "LOCAL_RANK": dist.get_rank(), "WORLD_SIZE": RANKS}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # asked for, and not used: the group is there
        os.environ.update({name: str(value) for name, value in place.items()})  # as its launcher does
        accelerator = Accelerator(cpu=True)
        model = build("none")
        model, optimizer = accelerator.prepare(model, adamw(model))
    else:
        model = build(kind)
        optimizer = adamw(model)
    ema = EMA(model, decay=0.9)
    save = ShardedSave(folder / "steps", model=model, optimizer=optimizer, ema=ema, when=every(2))
    export = HFExport(folder / "hf", model=model, ema=ema, when=last(), write_mode="files")
    hooks = Hooks(ema, save, export)
    step = hooks.resume()
    while step < 2:
        tokens = torch.randint(11, (3, 4))
        nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        hooks.step(step)
    hooks.close()
    parts = [torch.empty(1000) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, torch.ones(1000))
    if not bare:
        finish()
    elif accelerator is None:
        dist.destroy_process_group()
    if accelerator is not None:
        accelerator.end_training()


def run_example(name: str, folder: Path) -> None:
    """Run the example as a launcher does, in a folder that has its text and tokenizer."""
    sys.argv = [name, "--directory", str(folder), "--steps", "10"]
    runpy.run_path(str(PLACE / name), run_name="__main__")


@functools.cache
def prepare() -> Callable[[Path], None]:
    """Import what the examples import, before ranks are forked. Returns what makes their text, tokenizer and config."""
    sys.path.insert(0, str(PLACE))
    for name in EXAMPLES:
        runpy.run_path(str(PLACE / name))
    return importlib.import_module("fsdp2_loop").prepare


def count_ends(kind: str, count: int, *, bare: bool) -> Counter[str]:
    """How the ranks of so many jobs ended."""
    ends: Counter[str] = Counter()
    for number in range(count):
        root = Path(tempfile.mkdtemp(prefix="ends-"))
        if kind in EXAMPLES:
            prepare()(root / "run")
            pids = start_ranks(RANKS, partial(run_example, kind, root / "run"), root / "log", None)
        else:
            script = partial(run_script, kind, root / "run", bare=bare)
            pids = start_ranks(RANKS, script, root / "log", root / "store")
        found = wait_for(pids, 100)
        ends.update(map(str, found))
        if any(found):
            print(f"{kind} {number}: {found}", *[(root / f"log.{rank}").read_text() for rank in range(RANKS)])
        shutil.rmtree(root)
    return ends


def main() -> int:
    count, bare = int(sys.argv[1]), "--bare" in sys.argv
    kinds = [word for word in sys.argv[2:] if word != "--bare"] or GROUPS
    import torch._dynamo  # the first fully_shard wants it, which would take each rank a second
    import torch.profiler  # noqa: F401

    gc.freeze()
    found = {kind: count_ends(kind, count, bare=bare) for kind in kinds}
    for kind, ends in found.items():
        print(f"{kind}: {dict(ends)}", flush=True)
    return any(set(ends) != {"0"} for ends in found.values())


if __name__ == "__main__":
    sys.exit(main())
