from __future__ import annotations

import contextlib
import itertools
import json
import os
import pickle
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shardsmith import cli
from shardsmith.commands import to_hf
from shardsmith.commands.options import ExportArguments
from shardsmith.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    IncompleteCheckpointError,
    MismatchError,
    ProtectedPathError,
    ShardsmithError,
    TargetExistsError,
    UnsafeCheckpointError,
    UsageError,
    WriteError,
)
from shardsmith.manifest.seal import SEAL
from tests.dcp_directories import save
from tests.forked import run_forked
from tests.tensor_cases import raw_bytes
from tests.trained_runs import Trained


@dataclass(frozen=True, slots=True)
class Place:
    """Private copies of a checkpoint and a base, and where the export should go."""

    root: Path
    checkpoint: Path
    base: Path
    output: Path

    def arguments(self) -> list[str]:
        names = ("--checkpoint_dir", "--output_dir", "--base_model_path")
        values = map(str, (self.checkpoint, self.output, self.base))
        return ["to-hf", *itertools.chain(*zip(names, values, strict=True)), "--quiet"]

    def snapshot(self) -> dict[str, bytes | str]:
        return snapshot(self.root)

    def left_in_parent(self) -> list[str]:
        """What is in the output's parent. Not listed are empty directories without a final name: an attempt that is
        interrupted between its mkdir and its lock leaves one to the next run."""
        paths = (path for path in self.output.parent.iterdir() if path.name[0] != "." or os.listdir(path))
        return sorted(path.name for path in paths)


def snapshot(root: Path) -> dict[str, bytes | str]:
    """Everything below a directory: bytes of files, targets of links, and the names of everything else."""
    return {
        str(path.relative_to(root)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else "neither"
        for path in root.rglob("*")
    }


@pytest.fixture
def place(odd: Trained, tmp_path: Path) -> Place:
    (tmp_path / "exports").mkdir()
    (tmp_path / "exports" / "neighbour").write_text("somebody else's")
    checkpoint = shutil.copytree(odd.checkpoint, tmp_path / "run" / "step-3")
    return Place(tmp_path, checkpoint, shutil.copytree(odd.base, tmp_path / "base"), tmp_path / "exports" / "out")


def assert_refused(
    place: Place,
    capsys: pytest.CaptureFixture[str],
    error: type[ShardsmithError],
    *says: str,
    output: Path | None = None,
    checkpoint: Path | None = None,
    options: tuple[str, ...] = (),
) -> None:
    """That nothing happens on disk, Python gets this error, and a user exit code 2 with a text that says all this."""
    place = Place(place.root, checkpoint or place.checkpoint, place.base, output or place.output)
    before = place.snapshot()
    with pytest.raises(error):
        to_hf(place.checkpoint, place.base, ExportArguments(**_as_keywords(options)), place.output, quiet=True)
    assert cli.main([*place.arguments(), *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert error.__name__ in printed.err
    for text in says:
        assert text in printed.err
    assert place.snapshot() == before


def _as_keywords(options: tuple[str, ...]) -> dict[str, Any]:
    names = [name.removeprefix("--") for name in options[::2]]
    return dict(zip(names, options[1::2], strict=True))


ALIASES: dict[str, Callable[[Path, Path], Path]] = {  # input, an empty folder -> an output that would touch the input
    "the same": lambda given, _: given,
    "with dots": lambda given, _: given / ".." / given.name,
    "inside": lambda given, _: given / "out",
    "deep inside": lambda given, _: given / "a" / "b",
    "inside, with dots": lambda given, folder: folder / ".." / given.relative_to(folder.parent) / "out",
    "around": lambda given, _: given.parent,
    "far around": lambda _, folder: folder.parent,
    "a link to it": lambda given, folder: link(folder / "link", given),
    "a link to a link to it": lambda given, folder: link(folder / "second", link(folder / "first", given)),
    "a link around it": lambda given, folder: link(folder / "link", given.parent),
    "inside a link to it": lambda given, folder: link(folder / "link", given) / "out",
    "a dangling link into it": lambda given, folder: link(folder / "link", given / "out"),
    "through a link and back": lambda given, folder: link(folder / "link", given / "assets") / ".." / "out",
}


def link(name: Path, target: Path) -> Path:
    name.symlink_to(target)
    return name


@pytest.mark.parametrize("alias", ALIASES.values(), ids=ALIASES)
@pytest.mark.parametrize("given", ["checkpoint", "base"])
def test_an_output_that_would_touch_an_input_is_refused(
    given: str, alias: Callable[[Path, Path], Path], place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    (place.root / "folder").mkdir()
    (place.checkpoint / "assets").mkdir()
    output = alias(getattr(place, given), place.root / "folder")
    assert_refused(place, capsys, ProtectedPathError, str(output), "only read; choose another output", output=output)


def test_an_input_that_is_given_through_a_link_is_protected_too(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    linked = Place(place.root, place.checkpoint, link(place.root / "alias", place.base), place.base / "out")
    assert_refused(linked, capsys, ProtectedPathError, str(place.root / "alias"))


def test_the_current_directory_is_no_output(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place.output.parent)
    assert_refused(place, capsys, TargetExistsError, "exists already", output=Path("."))


EXISTING: dict[str, Callable[[Path], object]] = {
    "file": lambda path: path.write_bytes(b"precious"),
    "empty directory": lambda path: path.mkdir(),
    "directory with something in it": lambda path: shutil.copytree(path.parent.parent / "base", path),
    "link to a directory": lambda path: path.symlink_to(path.parent.parent / "elsewhere"),
    "link to a file": lambda path: path.symlink_to("neighbour"),
    "link that leads nowhere": lambda path: path.symlink_to("nowhere"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "pipe": lambda path: os.mkfifo(path),
}


@pytest.mark.parametrize("make", EXISTING.values(), ids=EXISTING)
@pytest.mark.parametrize("suffix", ["", "-ema"])
def test_an_existing_output_is_left_as_it_is(
    suffix: str, make: Callable[[Path], object], place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    (place.root / "elsewhere").mkdir()
    make(Path(f"{place.output}{suffix}"))
    says = f"{place.output}{suffix}: exists already and was left as it is; remove it or choose another name"
    assert_refused(place, capsys, TargetExistsError, says, options=("--ema_as", "directory"))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "deleted": lambda path: path.unlink(),
    "empty": lambda path: os.truncate(path, 0),
    "a byte short": lambda path: os.truncate(path, path.stat().st_size - 1),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp", "__1_0.distcp"])
def test_a_checkpoint_with_a_damaged_file_is_refused_by_name(
    file: str, damage: Callable[[Path], object], place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(place.checkpoint / file)
    assert_refused(place, capsys, CheckpointError, str(place.checkpoint), file)


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp", "__1_0.distcp"])
def test_a_plain_dcp_directory_with_a_damaged_file_is_refused_by_name(
    file: str,
    damage: Callable[[Path], object],
    trained: dict[tuple[str, int], Trained],
    place: Place,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain = shutil.copytree(trained["llama", 2].plain["nested"], place.root / "plain")
    damage(plain / file)
    assert_refused(place, capsys, CheckpointError, str(plain), file, checkpoint=plain)


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("file", ["model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"])
def test_a_hugging_face_directory_with_a_damaged_file_is_refused_by_name(
    file: str, damage: Callable[[Path], object], place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Place(place.root, place.checkpoint, place.base, place.root / "source")
    assert cli.main([*source.arguments(), "--models", "main", "--dtype", "original", "--max_shard_size", "2KB"]) == 0
    damage(source.output / file)
    assert_refused(place, capsys, IncompleteCheckpointError, str(source.output), file, checkpoint=source.output)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"checkpoint_type": "sharded", "schema_version": 1}'])
def test_a_damaged_manifest_is_refused(content: bytes, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    (place.checkpoint / "metadata.json").write_bytes(content)
    assert_refused(place, capsys, CheckpointError, "metadata.json")


def flip_a_bit_of_a_weight(place: Place, odd: Trained) -> Path:
    """In the first shard of the embedding, which nothing but a hash can notice; the file."""
    file = place.checkpoint / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[data.index(raw_bytes(odd.main["embed.weight"][:52])) + 100] ^= 1
    file.write_bytes(data)
    return file


def test_a_flipped_bit_is_found_and_the_file_named(
    odd: Trained, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    file = flip_a_bit_of_a_weight(place, odd)
    assert_refused(place, capsys, CorruptCheckpointError, str(place.checkpoint), f"{file.name}: has changed")


def test_without_verification_a_flipped_bit_goes_into_the_export(odd: Trained, place: Place) -> None:
    flip_a_bit_of_a_weight(place, odd)
    assert cli.main([*place.arguments(), "--no_verify", "--dtype", "original"]) == 0
    written = load_file(place.output / "model.safetensors")["embed.weight"]
    assert (written != odd.main["embed.weight"]).sum() == 1


@pytest.mark.parametrize("models", ["ema", "both"])
def test_a_model_that_the_checkpoint_lacks_is_refused(
    models: str, odd: Trained, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    says = "has no ema weights; it holds only main: --models main"
    options = ("--models", models)
    assert_refused(place, capsys, CheckpointNotFoundError, says, checkpoint=odd.plain["flat"], options=options)


def test_a_run_without_a_complete_step_is_refused(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    run = place.root / "half a run"
    shutil.copytree(place.checkpoint, run / "step-3", ignore=shutil.ignore_patterns("__0_0.distcp"))
    says = ("holds no complete checkpoint of a step; steps: 3", "__0_0.distcp")
    assert_refused(place, capsys, CheckpointNotFoundError, *says, checkpoint=run)


NO_CHECKPOINTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda _: None, "there is no such file or directory"),
    "empty directory": (lambda path: path.mkdir(), "none of its 0 entries"),
    "text": (lambda path: path.write_text("hello"), "a file that begins with b'hell'"),
    "torch file": (lambda path: torch.save({}, path), "torch"),
}


@pytest.mark.parametrize(("make", "says"), NO_CHECKPOINTS.values(), ids=NO_CHECKPOINTS)
def test_what_is_no_checkpoint_is_refused_with_what_it_is(
    make: Callable[[Path], object], says: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    path = place.root / "given.bin"
    make(path)
    assert_refused(place, capsys, CheckpointNotFoundError, str(path), says, checkpoint=path)


def test_a_base_without_config_is_refused(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    (place.base / "config.json").unlink()
    assert_refused(place, capsys, CheckpointNotFoundError, f"{place.base}: has no config.json; give the directory")


def test_a_base_that_is_no_directory_is_refused(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(place.base)
    assert_refused(place, capsys, CheckpointNotFoundError, f"{place.base}: there is no such file or directory")


@pytest.mark.parametrize("content", ["", "{", "[]", "\0"], ids=ascii)
def test_a_base_whose_config_is_no_json_object_is_refused(
    content: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    (place.base / "config.json").write_text(content)
    assert_refused(place, capsys, CorruptCheckpointError, str(place.base / "config.json"))


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("nowhere")], ids=["pipe", "dangling link"])
def test_a_base_with_a_file_that_cannot_be_copied_is_refused(
    make: Callable[[Path], object], place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    make(place.base / "vocab.txt")
    assert_refused(place, capsys, UnsafeCheckpointError, str(place.base / "vocab.txt"), "is not a regular file")


def test_every_difference_from_the_base_is_listed(
    odd: Trained, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    other = {name: tensor for name, tensor in odd.main.items() if not name.startswith("frozen.")}
    save_file(other | {"seen": torch.zeros(2), "extra": torch.zeros(1)}, place.base / "model.safetensors")
    lines = (
        "extra: in the base model, not in the checkpoint",
        "frozen.bias: in the checkpoint, not in the base model",
        "frozen.weight: in the checkpoint, not in the base model",
        "seen: () in the checkpoint, (2,) in the base model",
    )
    assert_refused(place, capsys, MismatchError, "4 tensors are not as in the base model", *lines, "--allow 'PATTERN'")


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("layers.0.sa_norm.scale", "as models of torchtune"),
        ("layers.0.attention.wq.weight", "--titan-model llama3 --titan-flavor 8B"),
        ("decoder.layers.self_attention.linear_qkv.weight", "export_ckpt of AutoBridge in Megatron Bridge"),
    ],
)
def test_names_of_a_trainers_own_models_are_refused_with_what_converts_them(
    name: str, advice: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(place.checkpoint)
    embedding = "embedding.word_embeddings.weight" if "qkv" in name else "tok_embeddings.weight"
    save({embedding: torch.zeros(2), name: torch.zeros(2)}, place.checkpoint)
    assert_refused(place, capsys, UsageError, name if "qkv" in name else embedding, advice)


def test_differences_from_the_base_that_are_allowed_by_name_pass(
    odd: Trained, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"embed.weight": odd.main["embed.weight"], "extra": torch.zeros(1)}, place.base / "model.safetensors")
    allowed = ("--allow", "frozen.*", "extra", "row.*", "mask", "[msn]*")
    assert cli.main([*place.arguments(), *allowed[:-1]]) == 2
    assert "3 tensors" in capsys.readouterr().err  # mean, nothing, seen
    assert cli.main([*place.arguments(), *allowed]) == 0


def test_a_size_that_is_none_is_refused(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--max_shard_size", "5 bananas")
    assert_refused(place, capsys, UsageError, "not a size: '5 bananas'; write it like 5GB", options=options)


class Hostile:
    """Makes a directory when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.canary),)


def test_a_hostile_index_is_refused_and_nothing_of_it_runs(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    (place.checkpoint / ".metadata").write_bytes(pickle.dumps(Hostile(place.root / "canary")))
    for manifest in (True, False):
        if not manifest:
            (place.checkpoint / "metadata.json").unlink()
        assert_refused(place, capsys, CheckpointError, str(place.checkpoint), ".metadata")
    assert_refused(place, capsys, UnsafeCheckpointError, "posix.mkdir")
    assert not (place.root / "canary").exists()


def test_a_parent_that_is_a_file_is_refused(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    output = place.output.parent / "neighbour" / "out"
    assert_refused(place, capsys, WriteError, str(output.parent), output=output)


@contextlib.contextmanager
def files_no_larger_than(limit: int) -> Iterator[None]:
    """The kernel ends each write there, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("options", [(), ("--ema_as", "directory")])
@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_a_full_disk_leaves_nothing(
    file: str, options: tuple[str, ...], place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    (place.base / "tokenizer.json").write_bytes(bytes(100_000))  # written after the weights, which have 4 kB
    with files_no_larger_than(50_000 if file == "tokenizer.json" else 2_000):
        assert_refused(place, capsys, WriteError, file, "File too large", "GB free on", options=options)


def test_a_rerun_after_a_full_disk_works(place: Place) -> None:
    with files_no_larger_than(2_000):
        assert cli.main(place.arguments()) == 2
    assert cli.main(place.arguments()) == 0


def without_times(directory: Path) -> dict[str, bytes | str]:
    """A snapshot of an export that is equal for equal exports."""
    found = snapshot(directory)
    facts = json.loads(found["shardsmith.json"])
    del facts["created_at"], facts[SEAL]  # its own hash, which covers the time
    return found | {"shardsmith.json": json.dumps(facts)}


def signal_at(number: int, parent: Path, which: signal.Signals) -> None:
    """Send this process a signal when it is about to make its ``number``-th step on disk in ``parent``."""
    steps = itertools.count(1)

    def audit(event: str, args: tuple[object, ...]) -> None:
        on_disk = event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") and not isinstance(args[0], int)
        if on_disk and Path(os.fsdecode(args[0])).is_relative_to(parent) and next(steps) == number:
            os.kill(os.getpid(), which)

    sys.addaudithook(audit)


def run_with_signals(_: int, place: Place, which: signal.Signals, report: Path) -> None:
    """Export in a child that gets the signal at its first step on disk, its second, and so on until none is left."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    cli.main([*place.arguments(), "--dry_run"])  # imports everything, so that no child has to
    exits = []
    for number in itertools.count(1):
        if (child := os.fork()) == 0:
            signal_at(number, place.output.parent, which)
            os._exit(cli.main(place.arguments()))
        status = os.waitpid(child, 0)[1]
        found = without_times(place.output) if place.output.exists() else None
        left = place.left_in_parent()
        exits.append({"status": os.waitstatus_to_exitcode(status), "found": found is not None, "left": left})
        complete = place.root / "complete"
        assert found in (None, without_times(complete)), f"torn at step {number}"
        if status == 0:
            break
        if found:
            shutil.rmtree(place.output)
    report.write_text(json.dumps(exits))


@pytest.fixture
def exits(place: Place, request: pytest.FixtureRequest) -> list[dict[str, object]]:
    """What every interrupted export left behind, the last one being the one that was not."""
    complete = Place(place.root, place.checkpoint, place.base, place.root / "complete")
    assert cli.main(complete.arguments()) == 0
    before = {name: data for name, data in place.snapshot().items() if not name.startswith("exports")}
    report = place.root / "report.json"
    run_forked(run_with_signals, 1, place, request.param, report)
    found = json.loads(report.read_text())
    report.unlink()
    after = {name: data for name, data in place.snapshot().items() if not name.startswith("exports")}
    assert after == before
    return found


@pytest.mark.parametrize("exits", [signal.SIGKILL], indirect=True)
def test_killed_at_any_step_it_leaves_no_torn_output_and_the_next_run_cleans_up(exits: list[dict[str, object]]) -> None:
    *killed, last = exits
    assert len(killed) > 25
    assert {run["status"] for run in killed} == {-signal.SIGKILL}
    assert any(len(run["left"]) > 1 for run in killed)
    assert last == {"status": 0, "found": True, "left": ["neighbour", "out"]}


@pytest.mark.parametrize("exits", [signal.SIGINT], indirect=True)
def test_interrupted_at_any_step_it_leaves_no_file_and_says_so(exits: list[dict[str, object]]) -> None:
    *interrupted, last = exits
    assert len(interrupted) > 25
    assert {run["status"] for run in interrupted} == {130}
    assert [run for run in interrupted if run["left"] != ["neighbour", *["out"] * run["found"]]] == []
    assert last["status"] == 0
