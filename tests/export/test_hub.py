"""Exports pushed to the Hub by its real client, in processes of their own: it reads its address when it is imported.

They are forked; ``test_a_push_is_one_commit_on_the_branch_of_its_step`` is the one that starts a new interpreter.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shardsmith import UsageError
from shardsmith.export.hub import branch_of, check_repository
from shardsmith.overview import inspect_run, read_events
from tests import forked
from tests.hub_server import TOKEN, Hub, running_hub
from tests.trained_runs import Trained

Runs = dict[tuple[str, int], Trained]

TRAINING = """
import sys
from tests.hooks.live_models import CASES, build, change
from shardsmith.hooks import EMA, HFExport, Hooks, every, json_lines, latest

case = next(case for case in CASES if case.kind == "llama")
model = build(case)
ema = EMA(model, decay=0.5)
export = HFExport(sys.argv[1], model=model, ema=ema, when=every(1), dtype="float32", keep=latest(1),
                  ema_as="directory", push_to_hub="org/run", on_push_error=sys.argv[2])
hooks = Hooks(ema, export, on_event=json_lines(sys.argv[1] + "/../events.jsonl"))
change(model, hooks)
hooks.close()
print("trained")
"""

RESUMED = """
import sys
from tests.hooks.live_models import CASES, build
from shardsmith.hooks import EMA, HFExport, Hooks, at, latest

model = build(next(case for case in CASES if case.kind == "llama"))
ema = EMA(model, decay=0.5)
with Hooks(ema, HFExport(sys.argv[1], model=model, ema=ema, when=at(9), ema_as="directory", keep=latest(1),
                         push_to_hub="org/run", on_push_error=sys.argv[2])) as hooks:
    hooks.resume()
"""

PUSHED_SOON = """
import sys
from shardsmith.cli import main
from shardsmith.export import hub

hub._PAUSE_SECS = 0.05
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def export(trained: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of several files. Read only."""
    from shardsmith.cli import main

    run, output = trained["qwen2", 2], tmp_path_factory.mktemp("hub") / "final"
    options = ["--checkpoint", str(run.checkpoint), "--base-model", str(run.base), "--output-dir", str(output)]
    assert main(["to-hf", *options, "--max-shard-size", "30KB", "--quiet"]) == 0
    return output


def forget_client() -> None:
    """So that it is imported again, and reads its address in this process."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
        del sys.modules[name]


def run_python(hub: Hub, home: Path, *arguments: str, is_new: bool = False) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path)}
    hub.use(environment)
    if is_new:
        command = [sys.executable, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    else:
        done = forked.run_python(*arguments, env=environment, before=forget_client)
    assert TOKEN not in done.stdout + done.stderr
    return done


def push(
    hub: Hub, home: Path, directory: Path, *options: str, is_new: bool = False
) -> subprocess.CompletedProcess[str]:
    return run_python(hub, home, "-m", "shardsmith", "push", str(directory), "org/name", *options, is_new=is_new)


def step_of(export: Path) -> Any:
    return json.loads((export / "shardsmith.json").read_text())["step"]


def files_of(export: Path) -> dict[str, bytes]:
    return {str(path.relative_to(export)): path.read_bytes() for path in export.rglob("*") if path.is_file()}


def test_a_push_is_one_commit_on_the_branch_of_its_step(hub: Hub, export: Path, tmp_path: Path) -> None:
    branch = f"step-{step_of(export)}"
    done = push(hub, tmp_path, export, is_new=True)
    assert (done.returncode, done.stdout.strip()) == (0, f"pushed {export} to {hub.endpoint}/org/name/tree/{branch}")
    found = hub.repositories["org/name"]
    attributes = found[branch].pop(".gitattributes")
    assert (found[branch], found["main"]) == (files_of(export), {".gitattributes": attributes})
    assert [commit[:2] for commit in hub.commits] == [("org/name", branch)]
    before = len(hub.commits)
    assert push(hub, tmp_path, export).returncode == 0
    assert len(hub.commits) == before, "it is there already"


def test_the_branch_holds_the_last_push_alone(hub: Hub, export: Path, tmp_path: Path) -> None:
    hub.repositories["org/name"] = {"main": {"model-00009-of-00009.safetensors": b"old", "README.md": b"old"}}
    assert push(hub, tmp_path, export, "--revision", "main").returncode == 0
    assert hub.repositories["org/name"]["main"] == files_of(export)


def test_what_may_pass_is_tried_again_and_nothing_is_sent_twice(hub: Hub, export: Path, tmp_path: Path) -> None:
    hub.fault = lambda request, seen: [503, 429, None][min(seen, 2)] if "/commit/" in request else None
    assert run_python(hub, tmp_path, "-c", PUSHED_SOON, "push", str(export), "org/name").returncode == 0
    assert sum("/commit/" in request for request in hub.requests) == 3
    uploads = [request for request in hub.requests if request.startswith("PUT /blobs/")]
    assert len(uploads) == len(set(uploads)) == len([*export.glob("*.safetensors")])


def test_a_refusal_says_why_and_leaves_the_branch(hub: Hub, export: Path, tmp_path: Path) -> None:
    hub.fault = lambda request, seen: 403 if "/commit/" in request else None  # noqa: ARG005
    done = push(hub, tmp_path, export)
    assert done.returncode == 2
    assert "status 403 (the token may not write there)" in done.stderr
    assert hub.commits == []
    hub.fault = lambda request, seen: None  # noqa: ARG005
    uploaded = sum(request.startswith("PUT /blobs/") for request in hub.requests)
    assert push(hub, tmp_path, export).returncode == 0
    assert sum(request.startswith("PUT /blobs/") for request in hub.requests) == uploaded


def test_a_damaged_export_is_not_pushed(hub: Hub, export: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(export, damaged)
    weights = next(damaged.glob("*.safetensors"))
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    done = push(hub, tmp_path, damaged)
    assert done.returncode == 2
    assert "was not pushed" in done.stderr
    assert hub.requests == []


def branches(hub: Hub, repository: str = "org/run") -> dict[str, dict[str, bytes]]:
    """What each branch holds but for the file that every repository has."""
    held = hub.repositories[repository].items()
    return {name: {k: v for k, v in files.items() if k != ".gitattributes"} for name, files in held}


def train(hub: Hub, home: Path, directory: Path, on_error: str) -> subprocess.CompletedProcess[str]:
    return run_python(hub, home, "-c", TRAINING, str(directory), on_error)


def test_a_run_pushes_each_export_before_retention_removes_it(hub: Hub, tmp_path: Path) -> None:
    done = train(hub, tmp_path, tmp_path / "hf", "raise")
    assert done.stdout.strip() == "trained", done.stderr
    on_hub, exported = branches(hub), {path.name: files_of(path) for path in sorted((tmp_path / "hf").glob("step-*"))}
    assert exported.keys() == {"step-2", "step-2-ema"}, "keep=latest(1) holds once all is pushed"
    assert on_hub.keys() == {"main", "step-1", "step-1-ema", "step-2", "step-2-ema"}
    assert {name: on_hub[name] for name in exported} == exported
    told = [event for event in read_events(tmp_path) if event["kind"] == "push"]
    assert [Path(event["path"]).name for event in told] == ["step-1", "step-1-ema", "step-2", "step-2-ema"]
    assert [event["nbytes"] for event in told[2:]] == [sum(map(len, files.values())) for files in exported.values()]
    assert all(event["error"] is None and event["seconds"] > event["seconds_waited"] for event in told)
    assert {one.path: one.pushed for one in inspect_run(tmp_path).steps} == {"hf/step-2": True, "hf/step-2-ema": True}
    assert "| step | 1 |" in on_hub["step-1"]["README.md"].decode()
    assert "average of the weights (EMA), decay 0.5" in on_hub["step-1-ema"]["README.md"].decode()


def test_a_run_goes_on_without_the_hub_and_the_next_one_pushes(hub: Hub, tmp_path: Path) -> None:
    hub.fault = lambda request, seen: 401  # noqa: ARG005
    done = train(hub, tmp_path, tmp_path / "hf", "warn")
    assert done.stdout.strip() == "trained", done.stderr
    assert f"shardsmith push {tmp_path}/hf/step-2 org/run --revision step-{{step}}" in done.stderr
    assert "status 401 (no valid token: run hf auth login, or set HF_TOKEN)" in done.stderr
    assert {one.pushed for one in inspect_run(tmp_path).steps} == {False}
    told = [event["error"] for event in read_events(tmp_path) if event["kind"] == "push"]
    assert all("no valid token" in error for error in told)
    assert len(told) == 4
    done = run_python(hub, tmp_path, "-c", RESUMED, str(tmp_path / "hf"), "raise")
    assert done.returncode == 1
    assert "making the repository failed: status 401" in done.stderr
    hub.fault = lambda request, seen: None  # noqa: ARG005
    exported = {path.name: files_of(path) for path in (tmp_path / "hf").iterdir() if path.is_dir()}
    assert run_python(hub, tmp_path, "-c", RESUMED, str(tmp_path / "hf"), "raise").returncode == 0
    assert {name: files for name, files in branches(hub).items() if name != "main"} == exported
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {*exported, ".retention.json"}, "all is pushed"


def test_names_that_cannot_be(tmp_path: Path) -> None:
    for name in ("name", "https://huggingface.co/org/name", "org/name/more", "../name", ""):
        with pytest.raises(UsageError):
            check_repository(name)
    for revision in ("", "-x", "a b", "x~1"):
        with pytest.raises(UsageError):
            branch_of(revision, 5)
    assert branch_of("runs/{step}", 5) == "runs/5"
    with pytest.raises(UsageError):
        branch_of("step-{step}", None)
    from shardsmith import push_export

    with pytest.raises(UsageError, match="is no export"):
        push_export(tmp_path, "org/name")
