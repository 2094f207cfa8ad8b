"""Commands that read steps in an object store give what they give of the same files on a disk."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import obstore
import pytest

from shardsmith import inspect_checkpoint
from shardsmith.cli import main
from shardsmith.errors import StorageError
from shardsmith.ground import object_store
from shardsmith.ground.remote_path import as_path
from shardsmith.manifest.metadata import read_metadata
from shardsmith.watch import Stop, Watcher, WatchOptions
from tests.faulty_proxy import Fault, Request, proxied
from tests.object_server import ObjectServer
from tests.trained_runs import Trained

Runs = dict[tuple[str, int], Trained]


@pytest.fixture
def step(object_server: ObjectServer, trained: Runs, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a step that lies there as ``ShardedSave`` puts it."""
    monkeypatch.setattr(object_store, "_clients", {})
    object_server.use()
    local = trained["qwen2", 2].checkpoint
    metadata = read_metadata(local)
    prefix = f"commands/step-{metadata.step}"
    for name in metadata.files:
        obstore.put(object_server.client(), f"{prefix}/{metadata.attempt}/{name}", (local / name).read_bytes())
    obstore.put(object_server.client(), f"{prefix}/metadata.json", (local / "metadata.json").read_bytes())
    return object_server.url(prefix)


def test_to_hf_writes_the_same_bytes(step: str, trained: Runs, tmp_path: Path) -> None:
    run = trained["qwen2", 2]
    for name, checkpoint in (("remote", step), ("local", str(run.checkpoint))):
        options = ["--checkpoint", checkpoint, "--base-model", str(run.base), "--output-dir", str(tmp_path / name)]
        assert main(["to-hf", *options, "--quiet"]) == 0
    for path in (tmp_path / "local").rglob("*.safetensors"):
        other = tmp_path / "remote" / path.relative_to(tmp_path / "local")
        assert hashlib.sha256(other.read_bytes()).digest() == hashlib.sha256(path.read_bytes()).digest()
    assert len([*(tmp_path / "local").rglob("*")]) == len([*(tmp_path / "remote").rglob("*")])


def test_to_hf_writes_into_a_store_what_it_writes_on_a_disk(
    object_server: ObjectServer, step: str, trained: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = str(trained["qwen2", 2].base)
    for output in (object_server.url("exported/final"), str(tmp_path / "final")):
        options = ["--checkpoint", step, "--base-model", base, "--output-dir", output, "--max-shard-size", "30KB"]
        assert main(["to-hf", *options, "--quiet"]) == 0
    found = object_server.keys("exported/final")
    local = tmp_path / "final"
    expected = {str(path.relative_to(local)): path for path in local.rglob("*") if path.is_file()}
    assert found.keys() == expected.keys()
    for name in found.keys() - {"shardsmith.json"}:
        data = bytes(obstore.get(object_server.client(), f"exported/final/{name}").bytes())
        assert data == expected[name].read_bytes(), name
    assert main(["to-hf", "--checkpoint", step, "--base-model", base, "--output-dir", f"{step}/hf"]) == 2
    assert "is only read" in capsys.readouterr().err
    assert main(["to-hf", "--checkpoint", step, "--base-model", base, "--output-dir", step.rpartition("/")[0]]) == 2


def test_inspect_and_verify_say_the_same(step: str, trained: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    local = str(trained["qwen2", 2].checkpoint)
    told = {}
    for place in (step, local):
        assert main(["inspect", place, "--verify", "--json"]) == 0
        told[place] = {**json.loads(capsys.readouterr().out), "path": ""}
    assert told[step] == told[local]
    assert main(["verify", step, local]) == 0
    assert main(["verify", "--json", step]) == 0


def test_pages_are_put_there(object_server: ObjectServer, step: str, trained: Runs, tmp_path: Path) -> None:
    local, place, base = trained["qwen2", 2], object_server.url("pages"), str(tmp_path / "base")
    options = ["--checkpoint", str(local.checkpoint), "--base-model", str(local.base), "--output-dir", base]
    assert main(["to-hf", *options, "--quiet"]) == 0
    commands = {
        "inspect": [step],
        "verify": [step, str(local.checkpoint)],
        "diagnose": ["--checkpoint", step, "--base-model", base],
    }
    for name, options in commands.items():
        for page in (f"{place}/{name}.html", str(tmp_path / f"{name}.html")):
            main([name, *options, "--html", page])
        found = bytes(obstore.get(object_server.client(), f"pages/{name}.html").bytes()).decode()
        expected = (tmp_path / f"{name}.html").read_text()
        # The minute may have changed between the two.
        made = re.compile(r"\d\d:\d\d UTC")
        assert made.sub("", found.replace(place, str(tmp_path))) == made.sub("", expected), name
    assert main(["inspect", step, "--html", f"{step}/page.html"]) == 2


def test_a_flipped_bit_is_found(object_server: ObjectServer, step: str) -> None:
    metadata = read_metadata_of(step)
    key = f"{step.removeprefix(object_server.url(''))}/{metadata}/__0_0.distcp"
    data = bytearray(bytes(obstore.get(object_server.client(), key).bytes()))
    data[len(data) // 2] ^= 1
    obstore.put(object_server.client(), key, bytes(data))
    assert main(["verify", step]) == 1
    assert "has changed since it was written" in inspect_checkpoint(step, verify=True).damage[0]


def test_a_flipped_bit_of_an_export_is_found(object_server: ObjectServer, step: str, trained: Runs) -> None:
    output = object_server.url("exported/flipped")
    options = ["--checkpoint", step, "--base-model", str(trained["qwen2", 2].base), "--output-dir", output]
    assert main(["to-hf", *options, "--quiet"]) == 0
    assert main(["verify", output]) == 0
    for name in ("model.safetensors", "config.json"):
        key = f"exported/flipped/{name}"
        whole = bytes(obstore.get(object_server.client(), key).bytes())
        data = bytearray(whole)
        data[-3] ^= 1
        obstore.put(object_server.client(), key, bytes(data))
        assert main(["verify", output]) == 1
        assert main(["inspect", output, "--verify"]) == 1
        obstore.put(object_server.client(), key, whole)
    obstore.put(object_server.client(), "exported/flipped/foreign.bin", b"foreign")
    assert main(["inspect", output]) == 1


def read_metadata_of(step: str) -> str:
    from shardsmith.ground.remote_path import as_path

    return read_metadata(as_path(step)).attempt


@pytest.mark.parametrize(
    "options",
    [
        ["to-dcp", "--model", "nowhere://bucket/x", "--output-dir", "out"],
        ["to-hf", "--checkpoint", "x", "--base-model", "b", "--output-dir", "nowhere://bucket/x"],
        ["to-dcp", "--base-model", "x", "--output-dir", "nowhere://bucket/x"],
        ["watch", "x", "--output-dir", "y", "--base-model", "nowhere://bucket/x"],
        ["diagnose", "--checkpoint", "x", "--base-model", "nowhere://bucket/x"],
        ["push", "nowhere://bucket/x", "org/name"],
        ["inspect", "nowhere://bucket/x"],
        ["inspect", "x", "--html", "nowhere://bucket/x"],
    ],
)
def test_what_a_command_cannot_reach_is_refused_by_name(
    options: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(options) == 2
    assert "is not supported" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_a_runs_place_is_taken_for_its_newest_step(step: str, trained: Runs, tmp_path: Path) -> None:
    run, base = step.rpartition("/")[0], str(trained["qwen2", 2].base)
    for name, checkpoint in (("run", run), ("step", step)):
        options = ["--checkpoint", checkpoint, "--base-model", base, "--output-dir", str(tmp_path / name), "--quiet"]
        assert main(["to-hf", *options]) == 0
    for path in (tmp_path / "run").rglob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "step" / path.relative_to(tmp_path / "run")).read_bytes()
    exported = str(tmp_path / "run")
    for checkpoint in (run, step, str(trained["qwen2", 2].checkpoint)):
        options = ["--base-model", exported, "--level", "structure", "--trained"]
        assert main(["diagnose", "--checkpoint", checkpoint, *options]) == 0
    assert main(["detect", step]) == 0


def test_watch_exports_what_is_in_a_store_to_a_store(
    object_server: ObjectServer, step: str, trained: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = str(trained["qwen2", 2].base)
    run, number = step.rpartition("/step-")[::2]
    for output in (object_server.url("watched"), str(tmp_path / "watched")):
        arguments = ["watch", run, "--output-dir", output, "--base-model", base, "--once", "--json"]
        assert main(arguments) == 0
        assert json.loads(capsys.readouterr().out)["status"] == "exported"
        assert main(arguments) == 0
        assert capsys.readouterr().out == "", "each step once"
    found = object_server.keys(f"watched/step-{number}")
    local = tmp_path / "watched" / f"step-{number}"
    assert found.keys() == {str(path.relative_to(local)) for path in local.rglob("*") if path.is_file()}
    assert main(["verify", object_server.url(f"watched/step-{number}"), str(local)]) == 0
    assert main(["detect", object_server.url(f"watched/step-{number}")]) == 0
    assert main(["inspect", object_server.url("watched"), "--verify", "--json"]) == 0
    (shown,) = json.loads(capsys.readouterr().out.splitlines()[-1])["steps"]
    assert (shown["kind"], shown["problems"]) == ("export", [])


def test_a_store_that_was_away_costs_a_watcher_no_step(
    object_server: ObjectServer, step: str, trained: Runs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, number = step.rpartition("/step-")[::2]
    with proxied(object_server) as proxy:
        object_server.use(AWS_ENDPOINT_URL=proxy.server.endpoint)
        watcher = Watcher(as_path(run), tmp_path / "watched", trained["qwen2", 2].base, WatchOptions())
        listings = 0

        def no_objects(request: Request, seen: int) -> Fault | None:  # noqa: ARG001
            return "expired" if "list-type" not in request.path else None

        def no_listings(request: Request, seen: int) -> Fault | None:  # noqa: ARG001
            nonlocal listings
            listings += "list-type" in request.path
            return "expired" if listings <= 3 else None

        proxy.fault = no_objects
        outcomes = watcher.follow(Stop(), 0.0)
        assert isinstance(next(outcomes).error, StorageError), "the step was listed, and could not be read"
        proxy.fault = no_listings
        outcome = next(outcomes)
    assert "could not list the steps" in caplog.text
    assert (outcome.step, outcome.status) == (int(number), "exported")
    assert watcher.failed == {}


def test_the_place_of_a_run_is_inspected_and_cleaned(
    object_server: ObjectServer, step: str, trained: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    run, number = step.rpartition("/step-")[::2]
    client, dead, aside = object_server.client(), "0123456789abcdef", "fedcba9876543210"
    dead_owner = {"host": "", "pid": 1, "started": ""}
    obstore.put(client, f"commands/step-9000/{dead}/__0_0.distcp", b"some")
    obstore.put(client, f"commands/step-9000/.{dead}.owner", json.dumps(dead_owner).encode())
    obstore.put(client, f"commands/step-8000/{aside}/__0_0.distcp", b"more")
    obstore.put(client, f"commands/step-8000/metadata.damaged-{aside}.json", b"{}")
    assert main(["inspect", run, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(one["step"], one["problems"]) for one in told["steps"]] == [(int(number), [])]
    local = inspect_checkpoint(trained["qwen2", 2].checkpoint)
    assert told["steps"][0]["world_size"] == local.world_size
    kinds = {one["path"]: one["kind"] for one in told["leftovers"]}
    damaged = f"step-8000/metadata.damaged-{aside}.json"
    assert kinds == {f"step-9000/{dead}": "unfinished", damaged: "damaged"}
    assert main(["clean", run, "--delete", "--set-aside", "--json"]) == 0
    gone = {one["path"]: one["deleted"] for one in json.loads(capsys.readouterr().out)["leftovers"]}
    assert gone == {f"step-9000/{dead}": False, damaged: True}, "another host may still write the first"
    assert not object_server.keys("commands/step-8000")
    assert main(["verify", step]) == 0


def test_what_is_no_step_of_ours_says_what_to_name(step: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = step.rpartition("/")[0]
    assert main(["verify", run]) == 1
    assert f"such as {step}" in capsys.readouterr().out.replace("\n", "")
    assert main(["inspect", f"{run}/nothing"]) == 2
    assert "there is nothing of that name" in capsys.readouterr().err
