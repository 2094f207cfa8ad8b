"""Diagnosing and verifying change nothing, ask nobody, and run nothing that lies in a checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shardsmith.cli import main
from tests.dcp_directories import save_sharded
from tests.diagnosed_models import Specimen
from tests.export.test_to_hf_refusals import snapshot
from tests.hostile_headers import HOSTILE
from tests.hostile_pickles import calls, instructions

WRITING = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.move"}
OUTSIDE = {"socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"}
_seen: list[str] | None = None


def _hook(event: str, args: tuple[object, ...]) -> None:
    if _seen is None:
        return
    if event in WRITING or event in OUTSIDE:
        _seen.append(f"{event} {args}")
    elif event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        _seen.append(f"open {args}")


sys.addaudithook(_hook)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What was written, asked or started while the test ran."""
    global _seen
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # of what is imported meanwhile
    _seen = []
    yield _seen
    _seen = None


@pytest.fixture
def olmo(specimens: dict[str, Specimen]) -> Specimen:
    return specimens["olmo2"]


@pytest.fixture
def place(olmo: Specimen, tmp_path: Path) -> Path:
    """A folder with a checkpoint and the model."""
    save_sharded(olmo.state, tmp_path / "checkpoint", 2)
    shutil.copytree(olmo.base, tmp_path / "model")
    return tmp_path


def commands(place: Path) -> list[list[str]]:
    checkpoint, model = str(place / "checkpoint"), str(place / "model")
    return [["diagnose", "--checkpoint", checkpoint, "--model", model], ["verify", checkpoint, model]]


def test_nothing_is_written_and_nobody_asked(place: Path, watched: list[str]) -> None:
    before = snapshot(place)
    for command in [*commands(place), ["verify", "--logits", *commands(place)[1][1:]]]:
        assert main(command) == 0
    assert watched == []
    assert snapshot(place) == before


@pytest.mark.parametrize("folder", ["checkpoint", "model"])
def test_a_report_is_not_written_into_what_it_is_about(folder: str, place: Path) -> None:
    before = snapshot(place)
    assert main([*commands(place)[0], "--html", str(place / folder / "report.html")]) == 2
    assert snapshot(place) == before


def test_a_name_that_is_not_in_the_cache_is_not_fetched(place: Path, watched: list[str]) -> None:
    assert main(["diagnose", "--checkpoint", str(place / "checkpoint"), "--model", "nobody/nothing"]) == 2
    assert watched == []


def test_code_in_checkpoint_and_model_is_not_run(place: Path) -> None:
    canary = place / "canary"
    code = f"open({str(canary)!r}, 'w')\nfrom transformers import Olmo2Config as Own, Olmo2ForCausalLM as OwnModel"
    for folder in ("checkpoint", "model"):
        (place / folder / "own.py").write_text(code)
        (place / folder / "tokenizer.py").write_text(code)
    config = json.loads((place / "model" / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}
    for folder in ("checkpoint", "model"):
        (place / folder / "config.json").write_text(json.dumps(config))
    for command in commands(place):
        assert main(command) == 0
    assert not canary.exists()


def hostile_pickles() -> list[str]:
    return [name for corpus in (calls, instructions) for name, _ in corpus(Path("canary"))]


@pytest.mark.parametrize("case", hostile_pickles())
def test_a_hostile_index_is_a_finding_and_runs_nothing(
    case: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    canary = place / "canary"
    data = dict((*calls(canary), *instructions(canary)))[case]
    (place / "checkpoint" / ".metadata").write_bytes(data)
    assert_told(place, capsys)
    assert not canary.exists()


@pytest.mark.parametrize("data", [pytest.param(case.values[0], id=case.id) for case in HOSTILE])
def test_a_hostile_safetensors_file_is_told_whichever_side_it_is_on(
    data: bytes, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(place / "checkpoint")
    (place / "checkpoint").mkdir()
    (place / "checkpoint" / "model.safetensors").write_bytes(data)
    assert_told(place, capsys)
    shutil.copy(place / "checkpoint" / "model.safetensors", place / "model" / "model.safetensors")
    for command in commands(place):
        assert main(command) == 2
        assert "Error" in capsys.readouterr().err


@pytest.mark.parametrize("cut", [0, 1, 100, 0.5, -1])
@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "__1_0.distcp"])
def test_a_truncated_file_is_told(name: str, cut: float, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = place / "checkpoint" / name
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * cut)] if isinstance(cut, float) else data[:cut])
    assert_told(place, capsys)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "__1_0.distcp"])
def test_a_file_that_is_gone_is_told(name: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "checkpoint" / name).unlink()
    assert_told(place, capsys)


def test_a_shard_of_other_bytes_is_told(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = place / "checkpoint" / "__1_0.distcp"
    file.write_bytes(bytes(file.stat().st_size))
    assert_told(place, capsys)


@pytest.mark.parametrize("target", ["/etc", "file", "fifo"])
def test_foreign_places_are_told(target: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(place / "checkpoint")
    if target == "/etc":
        (place / "checkpoint").symlink_to("/etc")
    elif target == "file":
        (place / "checkpoint").write_text("not a checkpoint")
    else:
        os.mkfifo(place / "checkpoint")
    assert_told(place, capsys)


STRANGE = {
    "nothing": b"",
    "no JSON": b"{",
    "a list": b"[1]",
    "a bomb": b"[" * 100_000,
    "text": b'{"input_ids": "hello", "checkpoint": 3, "model": "vocab", "job": []}',
    "ragged": b'{"input_ids": [[1], [2, 3]], "checkpoint": {"initial_load_path": 7, "folder": {}}}',
    "huge numbers": b'{"input_ids": [99999999999999999999999999, 1, 2]}',
    "tokens that the model has not": b'{"input_ids": [[0, 500, -3]]}',
    "bytes": bytes(range(256)) * 4,
}


@pytest.mark.parametrize("case", STRANGE)
@pytest.mark.parametrize(
    ("option", "name"),
    [
        ("--batch", "x.json"),
        ("--batch", "x.safetensors"),
        ("--buffers", "x.safetensors"),
        ("--training_config", "x.toml"),
        ("--training_config", "x.json"),
        ("--config", "config.json"),
        ("--tokenizer", "tokenizer.json"),
    ],
)
def test_what_lies_beside_may_be_strange_too(
    option: str, name: str, case: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = place / "beside"
    folder.mkdir()
    (folder / name).write_bytes(STRANGE[case])
    given = folder if option in ("--config", "--tokenizer") else folder / name
    assert main([*commands(place)[0], "--level", "model", option, str(given)]) in (1, 2)
    assert "Traceback" not in capsys.readouterr().err


def test_names_that_cannot_be_printed_are(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = load_file(place / "model" / "model.safetensors")
    state["\x1b[31mred\n\u202e"] = torch.zeros(3)
    shutil.rmtree(place / "checkpoint")
    (place / "checkpoint").mkdir()
    save_file(state, place / "checkpoint" / "model.safetensors")
    html = place / "report.html"
    assert main([*commands(place)[0], "--level", "structure", "--html", str(html)]) == 1
    printed = capsys.readouterr().out
    assert "\x1b[31m" not in printed
    assert "\u202e" not in printed


def assert_told(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Findings or a typed error, and no more; never 'nothing wrong'."""
    before = snapshot(place) if not (place / "checkpoint").is_symlink() else None
    for command in commands(place):
        command = [*command, "--level", "values"] if command[0] == "diagnose" else command
        assert main(command) in (1, 2)
        printed = capsys.readouterr()
        assert "Traceback" not in printed.out + printed.err
        assert "finding" in printed.out or "Error" in printed.err
    assert before is None or snapshot(place) == before
