"""Exports pushed to the Hub from an object store: what is there is what a push from a disk puts there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardsmith.cli import main
from shardsmith.ground import object_store
from shardsmith.ground.remote_path import as_path
from shardsmith.overview import inspect_run
from tests.export.test_hub import RESUMED, TRAINING, branches, run_python, step_of
from tests.hub_server import Hub, running_hub
from tests.object_server import ObjectServer
from tests.trained_runs import Trained

IN_A_STORE = TRAINING.replace(', on_event=json_lines(sys.argv[1] + "/../events.jsonl")', "")
BOUNDED = """
import shutil, sys, tempfile
from pathlib import Path
from shardsmith.cli import main
from shardsmith.ground import commit, local_copy

most = int(sys.argv.pop(1))
copy = local_copy.copy_file

def copy_counted(source, target):
    copy(source, target)
    held = sum(one.stat().st_size for one in target.parent.rglob("*.safetensors"))
    assert held <= most, (held, most)

import shardsmith.export.hub as hub
hub.copy_file = copy_counted
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def hub(object_server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(object_store, "_clients", {})
    object_server.use()
    with running_hub() as hub:
        yield hub


def files_in(directory: str) -> dict[str, bytes]:
    path = as_path(directory)
    return {name: (path / name).read_bytes() for name in path.objects_below()}  # type: ignore[attr-defined]


def test_a_push_from_a_store_is_that_of_the_export_and_holds_one_file_of_weights_at_a_time(
    hub: Hub, object_server: ObjectServer, trained: dict[tuple[str, int], Trained], tmp_path: Path
) -> None:
    run, url, local = trained["qwen2", 2], object_server.url("push/a b/final"), tmp_path / "final"
    for output in (url, str(local)):
        options = ["--checkpoint", str(run.checkpoint), "--base-model", str(run.base), "--output-dir", output]
        assert main(["to-hf", *options, "--max-shard-size", "30KB", "--quiet"]) == 0
    sizes = [path.stat().st_size for path in local.glob("*.safetensors")]
    branch = f"step-{step_of(local)}"
    hub.repositories["org/name"] = {"main": {}, branch: {"model-00009-of-00009.safetensors": b"old", "x/y": b"old"}}
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    hub.fault = lambda request, seen: 503 if "/commit/" in request and seen == 0 else None
    os.environ["TMPDIR"] = str(temporary)
    try:
        done = run_python(hub, tmp_path, "-c", BOUNDED, str(max(sizes)), "push", url, "org/name")
    finally:
        del os.environ["TMPDIR"]
    assert (done.returncode, done.stdout.strip()) == (0, f"pushed {url} to {hub.endpoint}/org/name/tree/{branch}"), (
        done.stderr
    )
    assert branches(hub, "org/name")[branch] == files_in(url)
    assert len(hub.commits) == 1
    uploads = [request for request in hub.requests if request.startswith("PUT /blobs/")]
    assert len(uploads) == len(set(uploads)) == len(sizes) > 1
    assert not [*temporary.rglob("*.safetensors")]
    assert object_server.secret_key not in done.stdout + done.stderr
    assert run_python(hub, tmp_path, "-m", "shardsmith", "push", url, "org/name").returncode == 0
    assert len(hub.commits) == 1, "it is there already"


def test_a_damaged_export_in_a_store_is_not_pushed(
    hub: Hub, object_server: ObjectServer, trained: dict[tuple[str, int], Trained], tmp_path: Path
) -> None:
    run, url = trained["qwen2", 2], object_server.url("push/damaged")
    options = ["--checkpoint", str(run.checkpoint), "--base-model", str(run.base), "--output-dir", url]
    assert main(["to-hf", *options, "--quiet"]) == 0
    weights = as_path(url) / "model.safetensors"
    content = weights.read_bytes()
    weights.store.put(weights.key, content[:-1] + bytes([content[-1] ^ 1]))  # type: ignore[attr-defined]
    done = run_python(hub, tmp_path, "-m", "shardsmith", "push", url, "org/name")
    assert done.returncode == 2
    assert "was not pushed" in done.stderr
    assert hub.requests == []


def test_what_a_run_could_not_push_from_a_store_the_next_one_pushes(
    hub: Hub, object_server: ObjectServer, tmp_path: Path
) -> None:
    place = object_server.url("push/run")
    hub.fault = lambda request, seen: 401  # noqa: ARG005
    done = run_python(hub, tmp_path, "-c", IN_A_STORE, place, "warn")
    assert done.stdout.strip() == "trained", done.stderr
    assert f"shardsmith push {place}/step-2 org/run --revision step-{{step}}" in done.stderr
    assert {one.pushed for one in inspect_run(place).steps} == {False}
    hub.fault = lambda request, seen: None  # noqa: ARG005
    done = run_python(hub, tmp_path, "-c", RESUMED, place, "raise")
    assert done.returncode == 0, done.stderr
    on_hub = {name: files for name, files in branches(hub).items() if name != "main"}
    assert on_hub == {name: files_in(f"{place}/{name}") for name in ("step-2", "step-2-ema")}
    assert {one.pushed for one in inspect_run(place).steps} == {None}
    left = {name.partition("/")[0] for name in files_in(place)}
    assert left == {".retention.json", "step-2", "step-2-ema"}, "all is pushed, and keep=latest(1) holds"
