"""An export that fails on one rank fails on all, quickly and by name, leaves nothing behind, and the next one works."""

from __future__ import annotations

import errno
import logging
import os
import re
import resource
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import fully_shard

from shardsmith.errors import CorruptCheckpointError, RankFailedError, ShardsmithError, UsageError
from shardsmith.formats.safetensors_files.writer import SafetensorsFileWriter
from shardsmith.hooks import EMA, HFExport, at, every
from tests.ranks import error_of_all, run_on_ranks

MiB = 1 << 20


class Run:
    """A model that trains, sharded over two ranks, and its exports."""

    def __init__(self, directory: Path, rows: int = 1024, *, average: bool = False, **options: Any) -> None:
        torch.manual_seed(3)
        self.directory = directory
        self.model = nn.Linear(2048, rows)
        fully_shard(self.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4)
        ema = EMA(self.model) if average else None
        self.export = HFExport(directory, model=self.model, ema=ema, when=every(1), dtype="original", **options)

    def train(self) -> None:
        self.model(torch.ones(2, 2048)).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def goes_on(self, *steps: int) -> None:
        """Train, export the last of the steps, and find exactly these, whole, with the weights as they are."""
        self.train()
        self.export.on_step_end(steps[-1])
        self.export.wait()
        expected = {name: tensor.full_tensor() for name, tensor in self.model.state_dict().items()}
        dist.barrier()
        assert {path.name for path in self.directory.iterdir()} == {f"step-{step}" for step in steps}
        found = load_file(self.directory / f"step-{steps[-1]}" / "model.safetensors")
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        dist.barrier()


def limit(what: int, size: int) -> None:
    resource.setrlimit(what, (size, resource.getrlimit(what)[1]))


def test_a_rank_that_cannot_collect_stage_or_write_fails_that_export_alone(tmp_path: Path) -> None:
    run_on_ranks(run_failing_ranks, 2, tmp_path, tmp_path)


def run_failing_ranks(directory: Path) -> None:
    logging.disable()  # the errors in the background thread are meant to happen
    for culprit in range(2):
        is_culprit = dist.get_rank() == culprit
        check_collecting(Run(directory / f"collecting-{culprit}"), culprit, is_culprit)
        check_staging(Run(directory / f"staging-{culprit}"), culprit, is_culprit)
        check_writing(Run(directory / f"writing-{culprit}"), culprit, is_culprit)
        files = Run(directory / f"files-{culprit}", average=True, write_mode="files")  # two, one for each rank
        check_writing(files, culprit, is_culprit)


def check_collecting(run: Run, culprit: int, is_culprit: bool) -> None:
    def refuse(*_: object) -> None:
        raise ZeroDivisionError("no state today")

    handle = run.model.register_state_dict_post_hook(refuse) if is_culprit else None
    text = error_of_all(lambda: run.export.on_step_end(1))
    assert text.startswith("collecting step-1 failed on 1 of 2 ranks")
    assert f"rank {culprit}: ZeroDivisionError: no state today" in text
    if handle:
        handle.remove()
    run.goes_on(1)
    run.export.close()


class Unreadable(torch.Tensor):
    """Memory that a copy cannot read, as that of a device that has failed."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.copy_, torch._foreach_copy_):
            raise ZeroDivisionError("the device is gone")
        return super().__torch_function__(func, types, args, kwargs or {})


def check_staging(run: Run, culprit: int, is_culprit: bool) -> None:
    for name in ("one", "two"):  # replicas, of which each rank stages one
        buffer = torch.zeros(4)
        run.model.register_buffer(name, buffer.as_subclass(Unreadable) if is_culprit else buffer)
    text = error_of_all(lambda: run.export.on_step_end(1))
    assert text == f"staging step-1 failed on 1 of 2 ranks\n  rank {culprit}: ZeroDivisionError: the device is gone"
    del run.model.one, run.model.two
    run.goes_on(1)
    run.export.close()


def check_writing(run: Run, culprit: int, is_culprit: bool) -> None:
    run.goes_on(1)
    if is_culprit:
        limit(resource.RLIMIT_FSIZE, MiB)  # a file of 8 is to be written
    run.export.on_step_end(2)
    text = error_of_all(run.export.wait)
    limit(resource.RLIMIT_FSIZE, resource.RLIM_INFINITY)
    assert "step-2 failed on 1 of 2 ranks" in text
    assert f"rank {culprit}: WriteError: " in text
    assert "File too large" in text
    run.goes_on(1, 2)
    run.export.close()


def test_a_rank_without_memory_to_stage_into_fails_that_export_alone(tmp_path: Path) -> None:
    run_on_ranks(run_without_memory, 2, tmp_path, tmp_path / "hf")


def run_without_memory(directory: Path) -> None:
    run = Run(directory, rows=30000)  # shards of 123 MB: more than has been freed so far
    if dist.get_rank() == 1:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        # Enough for what other threads of the process need meanwhile (without it libc aborts), too little for a shard.
        limit(resource.RLIMIT_AS, pages * resource.getpagesize() + 32 * MiB)
    text = error_of_all(lambda: run.export.on_step_end(1))
    limit(resource.RLIMIT_AS, resource.RLIM_INFINITY)
    assert text.startswith("staging step-1 failed on 1 of 2 ranks\n  rank 1: RuntimeError: ")
    assert "allocate" in text
    run.goes_on(1)
    run.export.close()


def test_a_place_that_cannot_be_written_to_is_an_error_of_all_ranks(tmp_path: Path) -> None:
    run_on_ranks(run_refused_places, 2, tmp_path, tmp_path)


def run_refused_places(directory: Path) -> None:
    logging.disable()
    check_no_folder(directory)
    check_folder_lost(Run(directory / "lost"))
    check_existing_target(Run(directory / "existing"))


def check_no_folder(directory: Path) -> None:
    if dist.get_rank() == 0:
        (directory / "file").write_text("mine")
    dist.barrier()
    with pytest.raises(UsageError, match=r"a directory is expected, but .*file is a file"):
        Run(directory / "file" / "hf")
    Run(directory / "hf").goes_on(1)


def check_folder_lost(run: Run) -> None:
    """The tests run as root, whom permissions do not stop: a file takes the place of the folder instead."""
    is_leader = dist.get_rank() == 0
    if is_leader:
        run.directory.rmdir()
        run.directory.write_text("mine")
    run.export.on_step_end(1)
    text = error_of_all(run.export.wait)
    assert "rank 0: WriteError: " in text
    assert "lost" in text
    if is_leader:
        assert run.directory.read_text() == "mine"
        run.directory.unlink()
    run.goes_on(1)
    run.export.close()


def check_existing_target(run: Run) -> None:
    make_foreign(run.directory / "step-1")
    run.export.on_step_end(1)
    text = error_of_all(run.export.wait)
    assert "rank 0: TargetExistsError: " in text
    assert "step-1: exists already and was left as it is" in text
    run.goes_on(1, 2)
    assert (run.directory / "step-1" / "mine").read_text() == "mine"
    run.export.close()


def make_foreign(directory: Path) -> None:
    if dist.get_rank() == 0:
        directory.mkdir()
        (directory / "mine").write_text("mine")
    dist.barrier()


def test_a_base_model_that_does_not_fit_is_an_error_of_all_ranks_that_names_every_tensor(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    save_file({"weight": torch.zeros(1024, 2049), "gate": torch.zeros(2)}, tmp_path / "base" / "model.safetensors")
    shutil.copytree(tmp_path / "base", tmp_path / "good")
    save_file({"weight": torch.zeros(1024, 2048), "bias": torch.zeros(1024)}, tmp_path / "good" / "model.safetensors")
    run_on_ranks(run_unfit_base, 2, tmp_path, tmp_path)


def run_unfit_base(directory: Path) -> None:
    text = error_of_all(lambda: Run(directory / "hf", base_model=directory / "base"))
    assert "rank 0: MismatchError: " in text
    assert "rank 1: " not in text  # once is enough
    for line in ("bias: in the", "gate: in the base model", "weight: (1024, 2048) in the"):
        assert f"\n  {line}" in text
    mine = directory / "good" if dist.get_rank() == 0 else directory / "elsewhere"
    text = error_of_all(lambda: Run(directory / "hf", base_model=mine))
    assert "failed on 1 of 2 ranks\n  rank 1: CheckpointNotFoundError: " in text
    run = Run(directory / "hf", base_model=directory / "good")
    run.goes_on(1)
    run.export.close()


class Filler:
    """A processor that takes up space when it is saved."""

    nbytes = 0

    def save_pretrained(self, directory: Path) -> None:
        (directory / "filler").write_bytes(b"x" * self.nbytes)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 20 MB; where none may be mounted, a directory on a disk that is never full."""
    command = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(tmp_path)]
    is_mounted = shutil.which("mount") is not None and subprocess.run(command, check=False).returncode == 0
    yield tmp_path
    if is_mounted:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def test_a_full_disk_is_an_error_of_all_ranks_and_the_next_export_works(
    small_disk: Path, tmp_path_factory: Any
) -> None:
    run_on_ranks(run_full_disk, 2, tmp_path_factory.mktemp("store"), small_disk / "hf")


def run_full_disk(directory: Path) -> None:
    logging.disable()
    filler = Filler()
    run = Run(directory, processor=filler)
    free = shutil.disk_usage(directory).free
    if free > 20 * MiB:  # it cannot be filled: each file may only be so long
        limit(resource.RLIMIT_FSIZE, 12 * MiB)
    filler.nbytes = 13 * MiB  # there is room for the weights, which are 8
    run.export.on_step_end(1)
    text = error_of_all(run.export.wait)
    assert "committing step-1 failed on 1 of 2 ranks\n  rank 0: WriteError: " in text
    assert re.search(r"No space left on device \(0\.\d+ GB free|File too large", text)
    filler.nbytes = 0
    run.goes_on(1)
    run.export.on_step_end(2)
    if free <= 20 * MiB:
        assert "making room for" in error_of_all(lambda: [run.export.on_step_end(3), run.export.wait()])
    run.export.close()


def test_ranks_that_hold_different_models_export_nothing(tmp_path: Path) -> None:
    run_on_ranks(run_disagreeing, 2, tmp_path, tmp_path / "hf")


def run_disagreeing(directory: Path) -> None:
    run = Run(directory)
    run.model.register_buffer("extra", torch.zeros(2 + dist.get_rank()))
    text = error_of_all(lambda: run.export.on_step_end(1))
    assert "RanksDisagreeError: ranks 1 are about to export other names, shapes, dtypes or files than rank 0" in text
    assert re.search(r"main extra: \(2,\) torch.\w+ on rank 0, \(3,\) torch.\w+ on rank 1", text)
    del run.model.extra
    run.goes_on(1)
    run.export.close()


def test_a_rank_that_hears_of_a_failure_first_stays_in_step_with_the_others(tmp_path: Path) -> None:
    run_on_ranks(run_hearing_first, 2, tmp_path, tmp_path / "hf")


def run_hearing_first(directory: Path) -> None:
    logging.disable()
    run = Run(directory)
    make_foreign(directory / "step-1")
    run.export.on_step_end(1)
    if dist.get_rank() == 1:
        with pytest.raises(RankFailedError, match="exists already"):
            run.export.wait()
    errors = []
    for step in (2, 3, 4):
        run.train()
        try:
            run.export.on_step_end(step)
        except ShardsmithError as error:
            errors.append(error)
    assert len(errors) == (1 if dist.get_rank() == 0 else 0)
    run.goes_on(1, 2, 3, 4, 5)
    run.export.close()


def test_a_rank_that_sees_the_end_of_an_export_first_stays_in_step_with_the_others(tmp_path: Path) -> None:
    run_on_ranks(run_seeing_first, 2, tmp_path, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"step-1", "step-3"}


def run_seeing_first(directory: Path) -> None:
    """On rank 0 the first export ends when the next one has begun; rank 1 sees its end at a step in between."""
    run, goes_on = Run(directory), threading.Event()
    run.export.when = at(1, 3)
    finish = run.export._finish

    def late(*args: Any) -> Any:
        made = finish(*args)
        assert goes_on.wait(60)
        return made

    if dist.get_rank() == 0:
        run.export._finish = late  # type: ignore[method-assign]
    run.export.on_step_end(1)
    while dist.get_rank() == 1 and run.export.in_flight:
        time.sleep(0.01)
    run.export.on_step_end(2)
    run.export.on_step_end(3)
    goes_on.set()
    run.export.wait()


@pytest.mark.parametrize("at", [-1, -3 * MiB])  # in the bias, and in the middle of the weight
def test_an_export_whose_file_holds_one_wrong_byte_never_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    def damage(writer: SafetensorsFileWriter) -> None:
        with writer.path.open("r+b") as file:
            file.seek(at, os.SEEK_END)
            byte = file.read(1)[0]
            file.seek(at, os.SEEK_END)
            file.write(bytes([byte ^ 1]))

    export = HFExport(tmp_path, model=nn.Linear(2048, 1024), when=every(1))
    with monkeypatch.context() as patch:
        patch.setattr(SafetensorsFileWriter, "sync", damage)
        export.export(1)
        with pytest.raises(CorruptCheckpointError, match="does not hold what was written to it"):
            export.wait()
    assert [*tmp_path.iterdir()] == []
    export.export(1)
    export.close()


@pytest.mark.parametrize("write_mode", ["slices", "files"])
def test_a_file_that_cannot_be_read_back_is_an_error_of_all_ranks(tmp_path: Path, write_mode: str) -> None:
    run_on_ranks(run_unreadable, 2, tmp_path, tmp_path, write_mode)


def run_unreadable(directory: Path, write_mode: str) -> None:
    """Cut off on one rank, as by somebody else; and a disk that fails."""
    logging.disable()
    sync, preadv = SafetensorsFileWriter.sync, os.preadv
    culprit = dist.get_rank() == 1

    def cut_off(writer: SafetensorsFileWriter) -> None:
        sync(writer)
        os.truncate(writer.path, writer.path.stat().st_size - 1)

    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    run = Run(directory / write_mode, average=True, write_mode=write_mode)
    if culprit:
        SafetensorsFileWriter.sync = cut_off  # type: ignore[method-assign]
    run.export.on_step_end(1)
    text = error_of_all(run.export.wait)
    SafetensorsFileWriter.sync = sync  # type: ignore[method-assign]
    assert "truncated" in text or "cut off" in text
    if culprit:
        os.preadv = fail
    run.train()
    run.export.on_step_end(2)
    text = error_of_all(run.export.wait)
    os.preadv = preadv
    assert re.search(r"cannot be read at byte \d+: Input/output error", text)
    run.goes_on(3)
    run.export.close()


def two_directories(directory: Path) -> HFExport:
    model = nn.Linear(3, 2)
    return HFExport(directory, model=model, ema=EMA(model), ema_as="directory", when=every(1))


def test_two_directories_of_one_step_fail_together(tmp_path: Path) -> None:
    export = two_directories(tmp_path)
    (tmp_path / "step-1-ema").mkdir()
    export.on_step_end(1)
    with pytest.raises(FileExistsError):
        export.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step-1-ema"]
    export.on_step_end(2)
    export.close()
    assert {path.name for path in tmp_path.iterdir()} == {"step-1-ema", "step-2", "step-2-ema"}


@pytest.mark.parametrize("lost", ["step-1", "step-1-ema"])
def test_a_run_that_was_killed_between_two_directories_of_a_step_adds_the_other_one(tmp_path: Path, lost: str) -> None:
    for _ in range(2):
        export = two_directories(tmp_path)
        export.on_step_end(1)
        export.close()
        assert {path.name for path in tmp_path.iterdir()} == {"step-1", "step-1-ema"}
        shutil.rmtree(tmp_path / lost)


def test_a_start_sweeps_what_dead_attempts_left_and_nothing_else(tmp_path: Path) -> None:
    for name in (".step-1.tmp-0123456789abcdef", ".step-2.trash-0123456789abcdef", "step-3.tmp", ".notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"torn")
    HFExport(tmp_path, model=nn.Linear(3, 2), when=every(1)).close()
    assert {path.name for path in tmp_path.iterdir()} == {"step-3.tmp", ".notes"}
