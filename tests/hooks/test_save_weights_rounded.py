"""bfloat16 files beside float32 masters: each number is written once, and a resume has every bit of it."""

from __future__ import annotations

import contextlib
import os
import random
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.multiprocessing import ProcessExitedException

from shardsmith.commands.to_dcp import to_dcp
from shardsmith.errors import CorruptCheckpointError, UsageError
from shardsmith.formats.by_path import open_source
from shardsmith.ground.layout import METADATA_FILE, REST_FOLDER
from shardsmith.hooks import EMA, Hooks, ShardedSave, at
from shardsmith.manifest.checkpoints import find_damage, find_foreign_files
from shardsmith.manifest.metadata import FileRecord, read_metadata
from shardsmith.run_state import weight_files
from shardsmith.tensors.tensors import Chunk, Shape, read_into, read_tensor
from tests.hooks.live_models import STEP, Case, build, shard
from tests.hooks.test_save_faults import flip_a_bit
from tests.hooks.test_save_weights import assert_same, digests, files_of, run_training_of
from tests.ranks import run_on_ranks

BFLOAT16 = {"weights": "huggingface", "weights_dtype": "bfloat16"}
CASES = [
    Case(kind="llama", sharding="none", ranks=0),
    Case(kind="qwen3_moe", sharding="fsdp2", ranks=2, max_shard_size="30KB"),
    Case(kind="mixtral", sharding="fsdp2", ranks=2),
    Case(kind="vit", sharding="tp", ranks=2),
    Case(kind="gemma", sharding="fsdp1", ranks=2),
    Case(kind="llama", sharding="hsdp", ranks=4),
]
HARD = [float("nan"), float("inf"), -float("inf"), -0.0, 1.00390625, -1.01171875, 1e-45, 3.4e38]
"""No number, infinities, ties that go up and down, the smallest, and one that is rounded to infinity."""


@torch.no_grad()
def make_hard(model: nn.Module) -> None:
    """What is rounded from float16 has a tie in every eighth element."""
    for i, parameter in enumerate(model.parameters()):
        parameter.copy_(parameter.half().float())
        parameter.view(-1)[i % 3 : i % 3 + len(HARD)] = torch.tensor(HARD)[: parameter.view(-1)[i % 3 :].numel()]


def run_saves(cases: list[Case], directory: Path) -> None:
    for case in cases:
        model = build(case)
        make_hard(model)
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            directory.mkdir(exist_ok=True)
            torch.save(model.state_dict(), directory / f"{case}.pt")
        model = shard(model, case.sharding)
        ema = EMA(model, decay=0.5)
        when = {"when": at(STEP), "max_shard_size": case.max_shard_size}
        save = ShardedSave(directory / str(case), model=model, ema=ema, **when, **BFLOAT16)
        with Hooks(ema, save) as hooks:
            for step in range(1, STEP + 1):
                hooks.step(step)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("rounded")
    for ranks in sorted({case.ranks for case in CASES}):
        chosen = [case for case in CASES if case.ranks == ranks]
        if ranks:
            run_on_ranks(run_saves, ranks, directory, chosen, directory)
        else:
            run_saves(chosen, directory)
    return directory


def bits_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int32) if tensor.dtype == torch.float32 else tensor


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("model", ["main", "ema"])
def test_it_reads_as_float32_bit_for_bit(saved: Path, case: Case, model: str) -> None:
    step = saved / str(case) / f"step-{STEP}"
    truth = torch.load(saved / f"{case}.pt", weights_only=True)
    source = open_source(step, model)
    for name in source.specs:
        found, wanted = read_tensor(source, name), truth[name]
        assert found.dtype == wanted.dtype
        if model == "main":
            assert torch.equal(bits_of(found), bits_of(wanted)), name
        else:  # the average of infinities is no number
            is_finite = wanted.isfinite()
            assert torch.equal(found[is_finite], wanted[is_finite]), name
    assert set(truth) == {*source.specs, *source.aliases}
    source.close()
    assert find_damage(step) == []
    assert find_foreign_files(step, read_metadata(step)) == []
    assert list((step / REST_FOLDER).glob("exceptions-*"))


def boxes_of(shape: Shape) -> list[Chunk]:
    """Some that begin and end anywhere."""
    generator = random.Random(str(shape))
    found = []
    for _ in range(5):
        ends = [sorted(generator.sample(range(size + 1), 2)) for size in shape if size]
        if len(ends) == len(shape):
            found.append(Chunk(tuple(first for first, _ in ends), tuple(end - first for first, end in ends)))
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_box_of_it_is_that_of_the_whole(saved: Path, case: Case) -> None:
    truth = torch.load(saved / f"{case}.pt", weights_only=True)
    with contextlib.closing(open_source(saved / str(case) / f"step-{STEP}")) as source:
        for name, spec in source.specs.items():
            for box in boxes_of(spec.shape):
                found = read_into(source, name, box, torch.empty(box.sizes, dtype=spec.dtype))
                wanted = truth[name][box.within(Chunk.whole(spec.shape))]
                assert torch.equal(bits_of(found), bits_of(wanted)), name


@pytest.mark.parametrize("kind", ["qwen2", "qwen3_moe"])
def test_a_killed_run_on_other_ranks_equals_a_straight_one_whose_weights_are_float32(tmp_path: Path, kind: str) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    run_training_of(kind, straight, 20, None)
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        run_on_ranks(run_training_of, 2, tmp_path, kind, killed, 20, 13, "huggingface", "bfloat16")
    run_training_of(kind, killed, 20, None, dtype="bfloat16")
    for number in (10, 20):
        step, whole = killed / f"step-{number}", straight / f"step-{number}"
        assert digests(step) == digests(whole)
        for folder in ("", "ema"):
            wanted = {name: rounded(value) for name, value in files_of(whole / folder).items()}
            assert_same(files_of(step / folder), wanted)
    assert abs(bytes_of(step) / bytes_of(whole) - 1) < 0.1  # of small tensors headers are a part
    assert to_dcp(str(step), tmp_path / "plain" / "step-20", whole=True, quiet=True) == 0
    assert digests(tmp_path / "plain" / "step-20") == digests(whole)


def rounded(value: Tensor) -> Tensor:
    return value.bfloat16() if value.is_floating_point() else value


def bytes_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def test_blocks_of_any_size_make_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.01171875))
            self.turned = nn.Parameter(torch.randn(7, 5).half().float().t())
            self.nothing = nn.Parameter(torch.empty(0, 3))

    model = Model()
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    for step, elements in ((1, 1 << 20), (2, 3), (3, 1)):
        monkeypatch.setattr(weight_files, "_ROUNDED_ELEMENTS", elements)
        save = ShardedSave(tmp_path, model=model, when=at(1), async_mode="disabled", **BFLOAT16)
        save.save(step)
        assert find_damage(tmp_path / f"step-{step}") == []
        for name in ("model.safetensors", f"{REST_FOLDER}/model.safetensors"):
            assert (tmp_path / f"step-{step}" / name).read_bytes() == (tmp_path / "step-1" / name).read_bytes()
        for value in model.parameters():
            nn.init.zeros_(value)
        assert save.resume(step=step) == step
        assert_same(model.state_dict(), kept)


@pytest.mark.parametrize("file", ["model.safetensors", "float32-rest/model.safetensors"])
def test_a_step_with_damage_in_either_part_is_not_resumed_from(tmp_path: Path, file: str) -> None:
    model = nn.Linear(64, 64)
    save = ShardedSave(tmp_path, model=model, when=at(1), async_mode="disabled", **BFLOAT16)
    save.save(1)
    kept = model.weight.detach().clone()
    save.save(2)
    flip_a_bit(tmp_path / "step-2" / file)
    nn.init.zeros_(model.weight)
    assert save.resume() == 1
    assert torch.equal(model.weight, kept)


def test_a_step_with_damaged_exceptions_is_not_resumed_from(tmp_path: Path) -> None:
    model = nn.Linear(64, 64)
    nn.init.constant_(model.weight, 1.01171875)
    save = ShardedSave(tmp_path, model=model, when=at(1), async_mode="disabled", **BFLOAT16)
    for step in (1, 2, 3):
        save.save(step)
    name = "float32-rest/exceptions-0.safetensors"
    with (tmp_path / "step-3" / name).open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(bytes(8))
    (tmp_path / "step-2" / name).unlink()
    nn.init.zeros_(model.weight)
    assert save.resume() == 1
    assert (model.weight == 1.01171875).all()


def packed(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(zlib.compress(data)), dtype=torch.uint8)


HUGE = np.array([2**62] * 3 + [0] * 5, np.int64)
ODD_EXCEPTIONS = {
    "indices that end within one": {"w:at": packed(bytes(10)), "w:by": packed(bytes(2))},
    "corrections that end within one": {"w:at": packed(bytes(8)), "w:by": packed(bytes(3))},
    "fewer corrections": {"w:at": packed(bytes(16)), "w:by": packed(bytes(2))},
    "no corrections": {"w:at": packed(bytes(8))},
    "no bytes": {"w:at": torch.zeros(8, dtype=torch.bfloat16), "w:by": packed(bytes(2))},
    "not packed": {"w:at": torch.zeros(8, dtype=torch.uint8), "w:by": packed(bytes(2))},
    "behind its end": {"w:at": packed(np.array([64], np.int64).tobytes()), "w:by": packed(bytes(2))},
    "an overflow": {"w:at": packed(HUGE.tobytes()), "w:by": packed(bytes(16))},
    "of another tensor": {"v:at": packed(bytes(8)), "v:by": packed(bytes(2))},
}


@pytest.mark.parametrize("kind", ODD_EXCEPTIONS)
def test_exceptions_that_make_no_sense_are_corrupt_under_right_hashes(tmp_path: Path, kind: str) -> None:
    model = nn.ParameterDict({"w": nn.Parameter(torch.full((8, 8), 1.01171875))})
    ShardedSave(tmp_path, model=model, when=at(1), async_mode="disabled", **BFLOAT16).save(1)
    step = tmp_path / "step-1"
    open_source(step).close()
    name = f"{REST_FOLDER}/exceptions-0.safetensors"
    save_file(ODD_EXCEPTIONS[kind], step / name)
    metadata, data = read_metadata(step), (step / name).read_bytes()
    record = FileRecord(size=len(data), xxh3_128=xxhash.xxh3_128_hexdigest(data))
    (step / METADATA_FILE).write_bytes(replace(metadata, files={**metadata.files, name: record}).to_json())
    with pytest.raises(CorruptCheckpointError, match="exceptions-0"):
        open_source(step)


@pytest.mark.parametrize(("live", "dtype"), [(torch.float64, "bfloat16"), (torch.float32, "float16")])
def test_what_would_not_come_back_is_refused(tmp_path: Path, live: torch.dtype, dtype: str) -> None:
    model = nn.Linear(3, 3, dtype=live)
    with pytest.raises(UsageError, match="would not come back bit for bit"):
        ShardedSave(tmp_path, model=model, when=at(1), weights="huggingface", weights_dtype=dtype)
