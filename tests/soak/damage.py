"""Every file of a checkpoint, an export and a trainer's folder is damaged in each way, and the damage must be found."""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from shardsmith.cli import main
from shardsmith.hooks import FolderSave
from shardsmith.manifest.companion import find_folder_damage
from tests.soak.job import Job, steps_in

FLIPS = 40
Damage = tuple[str, str, Callable[[Path], object]]
"""Its kind, the file, and what does it to a copy of the directory."""


def damage_all(work: Path, until: float, chance: random.Random, *, flips: int = FLIPS) -> Counter[str]:
    """What was damaged and what was found, by kind of directory and of damage."""
    job = Job(work / "run", 2, 6)
    job.run()
    found: Counter[str] = Counter()
    folders = {"checkpoint": steps_in(job.checkpoints), "export": steps_in(job.exports), "trainer's folder": []}
    folders["trainer's folder"] = [_trainer_folder(work / "trainer" / f"checkpoint-{step}", step) for step in (2, 4)]
    for kind, (other, directory) in folders.items():
        if _is_damaged(kind, directory):
            found[f"fault: false alarm on a sound {kind}"] += 1
        for name, file, act in _damages(kind, directory, other, chance, flips):
            if time.monotonic() > until:
                found["damage: not all was tried"] = 1
                return found
            copy = work / "copy" / directory.name
            shutil.copytree(directory, copy)
            act(copy)
            found[f"{kind}: {name}"] += 1
            if not _is_damaged(kind, copy):
                found[f"fault: {kind}: {name} not found"] += 1
                print(f"fault: {kind}: {name} of {file} was not found", flush=True)
            shutil.rmtree(work / "copy")
    return found


def _trainer_folder(folder: Path, step: int) -> Path:
    """A folder as a trainer writes it, with our record in it."""
    folder.mkdir(parents=True)
    torch.manual_seed(step)
    model = nn.Linear(16, 16)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    torch.save({"step": step}, folder / "optimizer.pt")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    FolderSave(model, async_mode="disabled").save(step, folder)
    return folder


def _is_damaged(kind: str, directory: Path) -> bool:
    """By one command, as a user would ask."""
    if kind == "trainer's folder":
        return bool(find_folder_damage(directory))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return main(["verify", str(directory)]) != 0


def _damages(kind: str, directory: Path, other: Path, chance: random.Random, flips: int) -> Iterator[Damage]:
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        name, data = str(path.relative_to(directory)), path.read_bytes()
        for bit in {0, len(data) * 8 - 1, *(chance.randrange(len(data) * 8) for _ in range(flips))}:
            yield "a bit flipped", name, lambda copy, name=name, data=data, bit=bit: _flip(copy / name, data, bit)
        for size in sorted({0, 1, len(data) // 2, max(0, len(data) - 512), len(data) - 1}):
            yield "cut off", name, lambda copy, name=name, data=data, size=size: (copy / name).write_bytes(data[:size])
        yield "a byte more", name, lambda copy, name=name, data=data: (copy / name).write_bytes(data + b"\0")
        yield "deleted", name, lambda copy, name=name: (copy / name).unlink()
        if (swapped := other / name).is_file() and swapped.read_bytes() != data:
            yield "that of another step", name, lambda copy, n=name, s=swapped: shutil.copy(s, copy / n)
    if kind != "trainer's folder":  # whose files are the trainer's business
        for name in ("__9_0.distcp", "pytorch_model.bin", "x.safetensors"):
            yield "a foreign file", name, lambda copy, name=name: (copy / name).write_bytes(b"x")


def _flip(path: Path, data: bytes, bit: int) -> None:
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << bit % 8
    path.write_bytes(flipped)
