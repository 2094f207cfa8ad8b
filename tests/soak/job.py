"""The training run that the soak kills, starves and damages, and what must be true of the disk after it.

What is on disk is looked at without this package: by json, xxhash, safetensors and torch's own reader.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import xxhash
from safetensors.torch import load_file
from torch import nn

from shardsmith.ground.layout import RETENTION_FILE
from shardsmith.hooks import EMA, HFExport, Hooks, ShardedSave, every, finish, latest
from tests.hooks.training import adamw, build
from tests.soak.forked import start_ranks, wait_for

SAVE_EVERY, EXPORT_EVERY, KEPT = 2, 3, 2
Digests = dict[str, dict[str, str]]
"""Name of a step directory -> tensor -> digest."""


@dataclass(frozen=True)
class Job:
    """One run of some ranks in a folder of its own."""

    folder: Path
    ranks: int
    steps: int

    @property
    def checkpoints(self) -> Any:
        return self.folder / "steps"

    @property
    def exports(self) -> Any:
        return self.folder / "hf"

    @property
    def save_options(self) -> dict[str, Any]:
        """More of ``ShardedSave``, on this rank."""
        return {}

    def committed(self) -> list[int]:
        """The steps that a resume could take."""
        return [int(path.name.removeprefix("step-")) for path in steps_in(self.checkpoints)]

    def leftovers(self) -> list[str]:
        """Hidden names beside the step directories, but for the note of retention, which stays."""
        places = (self.checkpoints, self.exports)
        return [path.name for place in places for path in place.glob(".*") if path.name != RETENTION_FILE]

    def visible(self) -> Job:
        """A job on a disk that has all that can be seen of this one."""
        return self

    def start(self) -> list[int]:
        """Fork the ranks; their pids."""
        self.folder.mkdir(parents=True, exist_ok=True)
        store = Path(tempfile.mktemp(prefix="store-", dir=self.folder))
        return start_ranks(self.ranks, partial(train, self), self.folder / "log", store)

    def run(self) -> None:
        """From the newest checkpoint to the end; nobody kills it."""
        ends = wait_for(self.start(), 120)
        if any(ends):
            logs = [(self.folder / f"log.{rank}").read_text() for rank in range(self.ranks)]
            raise AssertionError(f"{self.folder}: ended with {ends}\n" + "\n".join(logs))


@dataclass(frozen=True)
class Attached:
    """What ``train`` trains with."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    save: ShardedSave
    export: HFExport
    hooks: Hooks

    def step(self) -> None:
        """One optimizer step."""
        tokens = torch.randint(11, (3, 4))
        nn.functional.cross_entropy(self.model(tokens).flatten(0, 1), tokens.flatten()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def attach(job: Job, *, timeout_secs: float = 30.0) -> Attached:
    """Model and hooks of one rank. All ranks; communicates."""
    model = build("fsdp2")
    optimizer = adamw(model)
    ema = EMA(model, decay=0.9)
    options: dict[str, Any] = {"model": model, "ema": ema, "keep": latest(KEPT), "timeout_secs": timeout_secs}
    save = ShardedSave(job.checkpoints, optimizer=optimizer, when=every(SAVE_EVERY), **options, **job.save_options)
    export = HFExport(job.exports, when=every(EXPORT_EVERY), **options)
    return Attached(model, optimizer, save, export, Hooks(ema, save, export))


def train(job: Job) -> None:
    """What every rank does."""
    attached = attach(job)
    step = attached.hooks.resume()
    if torch.distributed.get_rank() == 0:
        (job.folder / "resumed").write_text(str(step))
    while step < job.steps:
        attached.step()
        step += 1
        attached.hooks.step(step)
    attached.hooks.close()
    finish()


def steps_in(directory: Path) -> list[Path]:
    """The step directories that can be seen, ascending."""
    found = directory.glob("step-*") if directory.is_dir() else []
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def look(job: Job, expected: Digests) -> list[str]:
    """What is torn among all that can be seen, or differs from the run that nobody killed."""
    problems, job = [], job.visible()
    for path in [*steps_in(job.checkpoints), *steps_in(job.exports)]:
        look_at = _look_at_checkpoint if path.parent == job.checkpoints else _look_at_export
        try:
            digests = look_at(path)
        except Exception as error:
            problems.append(f"{path}: {type(error).__name__}: {error}")
            continue
        known = expected.setdefault(f"{job.ranks}/{path.parent.name}/{path.name}", digests)
        if other := [name for name in {**known, **digests} if known.get(name) != digests.get(name)]:
            problems.append(f"{path}: {len(other)} of {len(digests)} differ from the undisturbed run: {other[:5]}")
    return problems


def _look_at_checkpoint(path: Path) -> dict[str, str]:
    manifest = json.loads((path / "metadata.json").read_bytes())
    assert {file.name for file in path.iterdir()} - {"metadata.json"} == set(manifest["files"])
    for name, record in manifest["files"].items():
        data = (path / name).read_bytes()
        assert len(data) == record["size"], name
        assert xxhash.xxh3_128_hexdigest(data) == record["xxh3_128"], name
    index = dcp.FileSystemReader(str(path)).read_metadata()
    state = {
        key: torch.empty(value.size, dtype=value.properties.dtype)
        for key, value in index.state_dict_metadata.items()
        if hasattr(value, "size")
    }
    dcp.load(state, storage_reader=dcp.FileSystemReader(str(path)), no_dist=True)
    return {name: record["digest"] for name, record in manifest["tensors"].items()}


def _look_at_export(path: Path) -> dict[str, str]:
    record = json.loads((path / "shardsmith.json").read_bytes())
    digests = {}
    for model, facts in record["models"].items():
        tensors: dict[str, Any] = {}
        for name in facts["files"]:
            tensors |= load_file(path / name)
        assert set(tensors) == set(facts["tensors"]), model
        digests |= {f"{model}/{name}": facts["tensors"][name]["digest"] for name in tensors}
    return digests
