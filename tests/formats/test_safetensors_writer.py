from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import resource
import stat
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from shardsmith.errors import TargetExistsError, UsageError, WriteError
from shardsmith.formats.safetensors_files.plan import FilePlan, plan_files
from shardsmith.formats.safetensors_files.writer import SafetensorsFileWriter
from shardsmith.tensors.tensors import Chunk
from tests.tensor_cases import partitions, random_tensor, raw_bytes, spec_of, tensors

NAMED = st.lists(tensors(), max_size=5).map(lambda found: {f"layer.{i}": tensor for i, tensor in enumerate(found)})


def plan_of(named: dict[str, Tensor], name: str = "model") -> FilePlan:
    return plan_files((spec_of(key, tensor) for key, tensor in named.items()), name).files[0]


def written(named: dict[str, Tensor], fill: Callable[[SafetensorsFileWriter], None]) -> bytes:
    """The bytes of a file that ``fill`` has filled; equal to the library's if it filled all of it."""
    with tempfile.TemporaryDirectory() as directory:
        with SafetensorsFileWriter.create(Path(directory), plan_of(named)) as writer:
            fill(writer)
            writer.sync()
        return (Path(directory) / "model.safetensors").read_bytes()


@given(NAMED, st.data())
def test_any_boxes_in_any_order_make_the_file_of_the_library(named: dict[str, Tensor], data: st.DataObject) -> None:
    boxes = [(key, box) for key, tensor in named.items() for box in data.draw(partitions(tuple(tensor.shape)))]
    order = data.draw(st.permutations(boxes))

    def fill(writer: SafetensorsFileWriter) -> None:
        for key, box in order:
            writer.write_box(key, box, named[key][box.within(Chunk.whole(tuple(named[key].shape)))])

    assert written(named, fill) == save(named, {"format": "pt"})


@given(NAMED, st.data())
def test_any_runs_in_any_order_make_the_file_of_the_library(named: dict[str, Tensor], data: st.DataObject) -> None:
    runs = []
    for key, tensor in named.items():
        cuts = data.draw(st.sets(st.integers(0, tensor.numel()), max_size=4)) | {0, tensor.numel()}
        runs += [(key, begin, end) for begin, end in itertools.pairwise(sorted(cuts))]
    order = data.draw(st.permutations(runs))

    def fill(writer: SafetensorsFileWriter) -> None:
        for key, a, b in order:
            writer.write_run(key, a, named[key].reshape(-1)[a:b])

    assert written(named, fill) == save(named, {"format": "pt"})


@given(tensors().filter(lambda tensor: tensor.dim() >= 2))
def test_strided_values_are_written_in_row_major_order(tensor: Tensor) -> None:
    turned = tensor.transpose(0, -1)
    copy = {"a": turned.contiguous()}
    box = Chunk.whole(tuple(turned.shape))
    assert written(copy, lambda writer: writer.write_run("a", 0, turned)) == save(copy, {"format": "pt"})
    assert written(copy, lambda writer: writer.write_box("a", box, turned)) == save(copy, {"format": "pt"})


def test_large_strided_boxes_are_written_block_by_block() -> None:
    tensor = random_tensor((3001, 40, 301), torch.bfloat16, seed=1)  # 72 MB: more than two blocks
    whole = {"a": tensor}

    def fill(writer: SafetensorsFileWriter) -> None:
        for begin, end in ((0, 100), (100, 301)):
            writer.write_box("a", Chunk((0, 0, begin), (3001, 40, end - begin)), tensor[:, :, begin:end])

    assert written(whole, fill) == save(whole, {"format": "pt"})


def test_lazily_conjugated_and_negated_values_are_resolved() -> None:
    tensor = torch.randn(3, 4, dtype=torch.complex64)
    named = {"conj": tensor.conj().resolve_conj(), "neg": tensor.conj().imag.resolve_neg()}

    def fill(writer: SafetensorsFileWriter) -> None:
        writer.write_run("conj", 0, tensor.conj())
        writer.write_run("neg", 0, tensor.conj().imag)

    assert written(named, fill) == save({k: v.contiguous() for k, v in named.items()}, {"format": "pt"})


def test_parameters_that_need_gradients_are_written() -> None:
    parameter = torch.nn.Parameter(torch.randn(3))
    data = written({"a": parameter}, lambda writer: writer.write_run("a", 0, parameter))
    assert data.endswith(raw_bytes(parameter.detach()))


def test_threads_and_processes_write_one_file_at_once(tmp_path: Path) -> None:
    tensor = random_tensor((64, 1024), torch.float32, seed=2)
    plan = plan_of({"a": tensor})
    writers = [SafetensorsFileWriter.create(tmp_path, plan), SafetensorsFileWriter.open_existing(tmp_path, plan)]
    with ThreadPoolExecutor(8) as pool:
        boxes = [Chunk((row, 0), (1, 1024)) for row in range(64)]
        jobs = [pool.submit(writers[b.offsets[0] % 2].write_box, "a", b, tensor[b.offsets[0], None]) for b in boxes]
        for job in jobs:
            job.result()
    for writer in writers:
        writer.close()
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("a").view(torch.int32), tensor.view(torch.int32))
        assert file.metadata() == {"format": "pt"}


def test_shards_and_index_load_as_a_transformers_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, vocab_size=50
    )
    model = AutoModelForCausalLM.from_config(config)
    weights = model.state_dict()
    plan = plan_files((spec_of(*item) for item in weights.items()), max_shard_bytes=6_000)
    for file in plan.files:
        with SafetensorsFileWriter.create(tmp_path, file) as writer:
            for name in file.tensors:
                writer.write_run(name, 0, weights[name])
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(plan.index))
    config.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    assert len(plan.files) > 2
    assert {name: raw_bytes(loaded[name]) for name in loaded} == {name: raw_bytes(weights[name]) for name in weights}


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077], ids=oct)
def test_the_umask_and_nothing_else_limits_who_may_read(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        SafetensorsFileWriter.create(tmp_path, plan_of({"a": torch.zeros(1)})).close()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode) == 0o666 & ~umask


@contextlib.contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """A disk that is full: writing past ``size`` fails, after a short write up to it. Python ignores SIGXFSZ."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_that_does_not_fit_is_refused_before_any_tensor_is_written(tmp_path: Path) -> None:
    plan = plan_of({"a": torch.zeros(100_000)})
    with files_no_larger_than(100_000), pytest.raises(WriteError, match=f"of {plan.size} bytes.*GB free") as caught:
        SafetensorsFileWriter.create(tmp_path, plan)
    assert caught.value.errno == errno.EFBIG
    assert str(tmp_path / "model.safetensors") in str(caught.value)


def test_a_disk_that_is_full_half_way_is_an_error_and_not_a_short_file(tmp_path: Path) -> None:
    values = torch.zeros(100_000)
    with SafetensorsFileWriter.create(tmp_path, plan_of({"a": values})) as writer:
        with files_no_larger_than(100_000):
            writer.write_run("a", 0, values[:20_000])
            with pytest.raises(WriteError, match="writing a failed: File too large"):
                writer.write_run("a", 0, values)
            with pytest.raises(WriteError, match="writing a failed"):
                writer.write_box("a", Chunk((50_000,), (1,)), values[:1])
        writer.write_run("a", 0, values)


PLANTS = {
    "file": lambda path: path.write_bytes(b"precious"),
    "directory": lambda path: path.mkdir(),
    "link": lambda path: path.symlink_to("precious"),
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "pipe": lambda path: os.mkfifo(path),
}


@pytest.mark.parametrize("plant", PLANTS.values(), ids=PLANTS)
def test_what_is_there_already_is_neither_followed_nor_changed(plant: Callable[[Path], object], tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"precious")
    plant(tmp_path / "model.safetensors")
    with pytest.raises(TargetExistsError, match="exists already"):
        SafetensorsFileWriter.create(tmp_path, plan_of({"a": torch.zeros(1)}))
    assert (tmp_path / "precious").read_bytes() == b"precious"
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("plant", PLANTS.values(), ids=PLANTS)
def test_only_a_file_made_from_the_same_plan_is_opened(plant: Callable[[Path], object], tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"precious")
    plant(tmp_path / "model.safetensors")
    with pytest.raises(WriteError, match=r"model\.safetensors"):
        SafetensorsFileWriter.open_existing(tmp_path, plan_of({"a": torch.zeros(1)}))


def test_a_file_of_another_plan_is_not_opened(tmp_path: Path) -> None:
    SafetensorsFileWriter.create(tmp_path, plan_of({"a": torch.zeros(1)})).close()
    with pytest.raises(WriteError, match="another plan"):
        SafetensorsFileWriter.open_existing(tmp_path, plan_of({"b": torch.zeros(1)}))


def test_a_missing_directory_is_a_write_error(tmp_path: Path) -> None:
    for opening in (SafetensorsFileWriter.create, SafetensorsFileWriter.open_existing):
        with pytest.raises(WriteError, match="No such file or directory"):
            opening(tmp_path / "missing", plan_of({"a": torch.zeros(1)}))


def test_a_closed_writer_does_not_write_into_a_file_that_got_its_number(tmp_path: Path) -> None:
    writer = SafetensorsFileWriter.create(tmp_path, plan_of({"a": torch.zeros(1)}))
    writer.close()
    writer.close()
    with (tmp_path / "other").open("wb"), pytest.raises(WriteError, match="Bad file descriptor"):
        writer.write_run("a", 0, torch.ones(1))
    assert (tmp_path / "other").read_bytes() == b""


BAD_BOXES = {
    "too few dimensions": (Chunk((0,), (4,)), torch.zeros(4)),
    "negative offset": (Chunk((-1, 0), (1, 5)), torch.zeros(1, 5)),
    "past the end": (Chunk((3, 0), (2, 5)), torch.zeros(2, 5)),
    "other shape than the box": (Chunk((0, 0), (2, 5)), torch.zeros(5, 2)),
    "offsets without sizes": (Chunk((0, 0), (4,)), torch.zeros(4)),
    "another dtype": (Chunk((0, 0), (4, 5)), torch.zeros(4, 5, dtype=torch.int32)),
    "no memory": (Chunk((0, 0), (4, 5)), torch.zeros(4, 5, device="meta")),
    "sparse": (Chunk((0, 0), (4, 5)), torch.zeros(4, 5).to_sparse()),
}


@pytest.mark.parametrize(("box", "values"), BAD_BOXES.values(), ids=BAD_BOXES)
def test_boxes_that_do_not_fit_the_plan_are_refused(box: Chunk, values: Tensor, tmp_path: Path) -> None:
    with SafetensorsFileWriter.create(tmp_path, plan_of({"a": torch.zeros(4, 5)})) as writer:
        before = writer.path.read_bytes()
        with pytest.raises(UsageError, match="a: "):
            writer.write_box("a", box, values)
        assert writer.path.read_bytes() == before


@pytest.mark.parametrize(("name", "first"), [("a", -1), ("a", 18), ("b", 0)])
def test_runs_that_do_not_fit_the_plan_are_refused(name: str, first: int, tmp_path: Path) -> None:
    writer = SafetensorsFileWriter.create(tmp_path, plan_of({"a": torch.zeros(4, 5)}))
    with writer, pytest.raises(UsageError, match=r"do not fit|without a tensor"):
        writer.write_run(name, first, torch.zeros(3))
