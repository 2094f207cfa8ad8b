"""What ``shardsmith diagnose`` costs: structure of a checkpoint of BAGEL's extent, and the values that a core reads.

The large checkpoint is 29 GB by its index, in 1223 tensors over 8 files, none of which has a byte on disk: what would
read the tensors would take long and fill the page cache. Values are compared in one thread, on files in the page cache.
"""

from __future__ import annotations

import pickle
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from shardsmith.compare.values import compare_tensor
from shardsmith.formats.by_path import open_source
from shardsmith.formats.safetensors_files.plan import plan_files
from shardsmith.tensors.digest import digest_run
from shardsmith.tensors.tensors import Chunk, TensorSource, TensorSpec

TENSORS, FILES = 1223, 8
# Together with the number of tensors: 29 GB in bfloat16.
_SHAPE = (3584, 3328)
_ARCHIVE_BYTES = 4096
"""More than what torch puts around the values of a chunk."""
# Elements of a block: 2 MB in float32, so that it stays in cache.
_BLOCK = 1 << 19


def measure_diagnosis(console: Console, work: Path, nbytes: int, runs: int) -> dict[str, Any]:
    """Make the files, run, print the table; the figures."""
    work = work / "diagnosis"
    console.print(f"an index of {TENSORS} tensors in {FILES} files, {TENSORS * _SHAPE[0] * _SHAPE[1] * 2 / 1e9:.1f} GB")
    checkpoint, model = _sparse_checkpoint(work / "sparse"), _sparse_model(work / "model")
    arguments = ["--checkpoint", str(checkpoint), "--model", str(model), "--level", "structure"]
    command = [sys.executable, "-m", "shardsmith.cli", "diagnose", *arguments]
    structure = [_whole_process(command) for _ in range(runs)]
    torch_alone = [_whole_process([sys.executable, "-c", "import torch"]) for _ in range(runs)]
    rates = _rates(work, nbytes, runs)
    console.print(_table(structure, torch_alone, rates))
    return {"structure": structure, "import torch": torch_alone, "GB/s a core": rates}


def _specs() -> Iterator[TensorSpec]:
    for i in range(TENSORS):
        yield TensorSpec(f"language_model.model.layers.{i // 28}.part{i % 28}.weight", _SHAPE, torch.bfloat16)


def _sparse_checkpoint(directory: Path) -> Path:
    """A DCP directory, sharded along the rows as FSDP2 does it, of files that are all hole."""
    directory.mkdir(parents=True)
    rows = _SHAPE[0] // FILES
    # Each file holds the same rows of every tensor, one archive after the other.
    length = rows * _SHAPE[1] * 2 + _ARCHIVE_BYTES
    tensors, places = {}, {}
    for i, spec in enumerate(_specs()):
        chunks = []
        for part in range(FILES):
            offsets = torch.Size([part * rows, 0])
            chunks.append(ChunkStorageMetadata(offsets, torch.Size([rows, _SHAPE[1]])))
            places[MetadataIndex(spec.name, offsets)] = _StorageInfo(f"__{part}_0.distcp", i * length, length)
        properties = TensorProperties(dtype=spec.dtype)
        tensors[spec.name] = TensorStorageMetadata(properties, torch.Size(_SHAPE), chunks)
    for part in range(FILES):
        _hole(directory / f"__{part}_0.distcp", b"", TENSORS * length)
    paths = {name: (name,) for name in tensors}
    index = Metadata(state_dict_metadata=tensors, planner_data=paths, storage_data=places)
    (directory / ".metadata").write_bytes(pickle.dumps(index))
    return directory


def _sparse_model(directory: Path) -> Path:
    """A Hugging Face directory of the same tensors: headers, and holes."""
    directory.mkdir(parents=True)
    (plan,) = plan_files(_specs()).files
    _hole(directory / plan.name, plan.header, plan.size)
    (directory / "config.json").write_text('{"model_type": "bagel"}')
    return directory


def _hole(path: Path, begin: bytes, size: int) -> None:
    with path.open("wb") as file:
        file.write(begin)
        file.truncate(size)


def _whole_process(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def _rates(work: Path, nbytes: int, runs: int) -> dict[str, float]:
    """Bytes of the checkpoint a second, in one thread; the median."""
    tensor = torch.randn(nbytes // 4)
    save_file({"w": tensor}, work / "one.safetensors")
    save_file({"w": tensor}, work / "other.safetensors")
    save_file({"w": tensor.bfloat16()}, work / "rounded.safetensors")
    del tensor
    one, other, rounded = (open_source(work / f"{name}.safetensors") for name in ("one", "other", "rounded"))
    before = torch.get_num_threads()
    # One thread: the figure is one of a core.
    torch.set_num_threads(1)
    try:
        return {
            "digest": _rate(lambda: _digest(one), nbytes, runs),
            "compare, equal": _rate(lambda: compare_tensor(one, other, "w"), nbytes, runs),
            "compare, rounded to bfloat16": _rate(lambda: compare_tensor(one, rounded, "w"), nbytes, runs),
        }
    finally:
        torch.set_num_threads(before)


def _digest(source: TensorSource) -> None:
    count = source.specs["w"].shape[0]
    for start in range(0, count, _BLOCK):
        for _, values in source.pieces("w", Chunk((start,), (min(_BLOCK, count - start),))):
            digest_run(values, start)


def _rate(work: Callable[[], object], nbytes: int, runs: int) -> float:
    # Once without counting: the files are in the page cache then.
    work()
    seconds = []
    for _ in range(runs):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return nbytes / statistics.median(seconds) / 1e9


def _table(structure: list[float], torch_alone: list[float], rates: dict[str, float]) -> Table:
    table = Table("diagnose", "measured", "aim")
    alone = f"of which {statistics.median(torch_alone):.2f} s to import torch"
    table.add_row("structure, whole process", f"{statistics.median(structure):.2f} s, {alone}", "<= 2 s")
    for name, rate in rates.items():
        table.add_row(f"values: {name}", f"{rate:.2f} GB/s a core", ">= 1.5 GB/s")
    return table
