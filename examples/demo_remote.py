"""The main job without a shared folder: everything in an object store of this machine (``make demo-remote``).

Two ranks with a directory each train, save and export to SeaweedFS by its S3 protocol; SIGKILL; one rank goes on, then
three; what is exported is downloaded and loaded. Prints a table of checks; exits with 1 if any fails.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import obstore
import torch
from demo import TOLERANCE, Check, console, load, say, shardsmith, table_of, train

sys.path.insert(0, str(Path(__file__).parent.parent))  # the server is that of the tests
from tests.object_server import ObjectServer, running_server


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("demo-run"), help="where the ranks work; made anew")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    arguments = parser.parse_args()
    run, steps = arguments.run.absolute(), arguments.steps
    shutil.rmtree(run, ignore_errors=True)
    began = time.monotonic()
    with running_server(run / "server") as server:
        server.use()
        checks = [*train_with_a_kill(server, run, steps), *download_and_load(server, run, steps)]
    console.print(table_of(checks))
    failed = [name for name, _, passed in checks if not passed]
    console.print(f"{len(checks) - len(failed)} of {len(checks)} checks passed in {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


def train_with_a_kill(server: ObjectServer, run: Path, steps: int) -> Iterator[Check]:
    url, kill_at, middle = server.url("run"), steps * 5 // 10, steps * 7 // 10
    say(f"Two ranks, each with a directory of its own, save to {url}; SIGKILL after step {kill_at}")
    train(run, steps, kill_at, ranks=2, store_url=url)
    before = 0
    for ranks, goal in ((1, middle), (3, steps)):
        say(f"The same command on {ranks}, to step {goal}")
        lines = train(run, goal, ranks=ranks, store_url=url)
        resumed = next((int(line.split()[-1]) for line in lines if line.startswith("resumed at step ")), 0)
        yield (
            f"{ranks} ranks came back from the store",
            f"step {resumed}",
            before < resumed <= max(kill_at + 10, middle),
        )
        before = resumed
    own = sorted(path.name for rank in run.glob("rank-*") for path in rank.iterdir())
    yield "no step is on a local disk", ", ".join(sorted({*own})), not any("checkpoints" in one for one in own)
    say("What is in the store")
    shardsmith("inspect", url, "--verify")
    newest = f"{url}/checkpoints/step-{steps}"
    shardsmith("verify", newest)
    left = {key.split("/")[0] for key in server.keys("run/checkpoints")} - {".retention.json"}
    yield "retention has kept three steps", ", ".join(sorted(left)), len(left) == 3 and f"step-{steps}" in left


def download_and_load(server: ObjectServer, run: Path, steps: int) -> Iterator[Check]:
    in_loop = json.loads((run / "rank-0" / "evaluation.json").read_text())
    test = torch.load(run / "rank-0" / "tokens.pt", weights_only=True)["test"]
    for model, name in (("main", f"step-{steps}"), ("ema", f"step-{steps}-ema")):
        directory = download(server, f"run/hf/{name}", run / "downloaded" / name)
        shardsmith("verify", str(directory))
        loss, _ = load(directory, test)
        difference = abs(loss - in_loop[model])
        what = f"{loss:.6f} loaded, {in_loop[model]:.6f} in the loop, differ by {difference:.1e}"
        yield f"{model}, downloaded: loss as in the loop within 0.02", what, difference <= TOLERANCE["bfloat16"]


def download(server: ObjectServer, prefix: str, target: Path) -> Path:
    """Copy what is below a prefix into a folder."""
    for name in server.keys(prefix):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(bytes(obstore.get(server.client(), f"{prefix}/{name}").bytes()))
    return target


if __name__ == "__main__":
    sys.exit(main())
