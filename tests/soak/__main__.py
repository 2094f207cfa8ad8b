"""Faults by the hundred, with the table of what came of them, as it stands in docs/reliability.md.

python -m tests.soak [--minutes 60] [--kills 1000] [--ends 200] [--seed N] [--only kills remote damage ...]
"""

from __future__ import annotations

import argparse
import datetime
import gc
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.soak.damage import damage_all
from tests.soak.ends import EXAMPLES, GROUPS, count_ends
from tests.soak.injected import inject_all
from tests.soak.kills import kill_at_random
from tests.soak.remote import kill_remote

SHARES = {"kills": 0.3, "remote": 0.15, "disk": 0.25, "ends": 0.15, "raise": 0.04, "exit": 0.06, "damage": 0.05}
"""Of the time, in the order in which they run; what one does not use is for those after it."""


def main() -> int:
    options = _options()
    import torch._dynamo  # the first fully_shard wants it, which would take each rank a second
    import torch.profiler  # noqa: F401

    gc.freeze()
    chance = random.Random(options.seed)
    print(f"seed {options.seed}", flush=True)
    work = Path(tempfile.mkdtemp(prefix="soak-"))
    tables = {}
    end = time.monotonic() + options.minutes * 60
    left = {name: share for name, share in SHARES.items() if name in options.only}
    while left:
        name, share = next(iter(left.items()))
        until = time.monotonic() + (end - time.monotonic()) * share / sum(left.values())
        tables[name] = _run(name, work / name, until, chance, options)
        del left[name]
        _print(name, tables[name])
    shutil.rmtree(work)
    print(_title())
    for name, found in tables.items():
        _print(name, found)
    return any(name.startswith("fault") for found in tables.values() for name in found)


def _run(name: str, work: Path, until: float, chance: random.Random, options: argparse.Namespace) -> Counter[str]:
    work.mkdir()
    if name == "kills":
        return kill_at_random(work, options.kills, until, chance)
    if name == "remote":
        return kill_remote(work, options.remote_kills, until, chance)
    if name == "damage":
        return damage_all(work, until, chance, flips=options.flips)
    if name == "ends":
        return _ends(options.ends, until)
    return inject_all(work, name, until, chance.randrange(4))  # type: ignore[arg-type]


def _ends(count: int, until: float) -> Counter[str]:
    found: Counter[str] = Counter()
    for kind in [*GROUPS] * count + [*EXAMPLES] * count:
        if time.monotonic() > until:
            break
        for end, times in count_ends(kind, 1, bare=False).items():
            found[f"{kind}: ranks that ended with 0" if end == "0" else f"fault: {kind}: ended with {end}"] += times
    return found


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--remote-kills", type=int, default=200, help="of runs in an object store")
    parser.add_argument("--ends", type=int, default=200, help="of each kind, those of the examples last")
    parser.add_argument("--flips", type=int, default=40, help="of every file")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--only", nargs="+", choices=[*SHARES], default=[*SHARES])
    return parser.parse_args()


def _title() -> str:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return f"{datetime.date.today()}, commit {commit.stdout.strip() or 'unknown'}"


def _print(name: str, found: Counter[str]) -> None:
    for what, count in sorted(found.items()):
        print(f"| {name} | {what} | {count} |", flush=True)
    if not any(what.startswith("fault") for what in found):
        print(f"| {name} | faults | 0 |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
