"""Models to start from in an object store: made by ``to-dcp``, read as base models, loaded by ranks; as on a disk."""

from __future__ import annotations

import os
import shutil
import signal
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import obstore
import pytest
import torch
import torch.distributed as dist

from shardsmith.cli import main
from shardsmith.errors import CheckpointNotFoundError
from shardsmith.ground import object_store
from shardsmith.ground.commit import sweep
from shardsmith.ground.remote_path import as_path
from shardsmith.hooks import HFExport, Hooks, InitialLoad, at
from shardsmith.load.load import load_initial, verify_loaded
from shardsmith.manifest.metadata import read_metadata
from tests.dcp_directories import load
from tests.faulty_proxy import Proxy, Request, proxied
from tests.forked import start_python
from tests.hooks.initial_models import gathered, make_sources, options, started
from tests.object_server import ObjectServer
from tests.ranks import run_on_ranks
from tests.trained_runs import Trained

Runs = dict[tuple[str, int], Trained]


@pytest.fixture(autouse=True)
def _client(object_server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "_clients", {})
    object_server.use()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in every format. Read only."""
    root = tmp_path_factory.mktemp("sources")
    torch.save(make_sources("qwen2", root), root / "truth.pt")
    (root / "hf" / "tokenizer.json").write_text("{}")
    return root


def put(server: ObjectServer, local: Path, name: str) -> str:
    """Copy a directory there under the names of its files."""
    for path in local.rglob("*"):
        if path.is_file():
            obstore.put(server.client(), f"{name}/{path.relative_to(local)}", path.read_bytes())
    return server.url(name)


def download(server: ObjectServer, prefix: str, folder: Path) -> Path:
    for name in server.keys(prefix):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes(obstore.get(server.client(), f"{prefix}/{name}").bytes()))
    return folder


def to_dcp(base: str | Path, output: str | Path, *more: str) -> int:
    return main(["to-dcp", "--base-model", str(base), "--output-dir", str(output), "--quiet", *more])


def assert_same_checkpoint(found: Path, expected: Path, truth: Path) -> None:
    names = {path.name for path in expected.iterdir()}
    assert {path.name for path in found.iterdir()} | {"metadata.json"} == names
    for name in names - {"metadata.json", ".metadata"}:  # which hold the random id of their attempt
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name
    state = torch.load(truth)
    loaded = load({name: torch.zeros_like(value) for name, value in state.items()}, found)  # plain dcp.load
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


@pytest.mark.parametrize("name", ["olmo2", "step-0"])
def test_to_dcp_writes_into_a_store_what_it_writes_on_a_disk(
    object_server: ObjectServer, sources: Path, tmp_path: Path, name: str
) -> None:
    base, output = put(object_server, sources / "hf", f"bases/{name}"), object_server.url(f"converted/{name}")
    assert to_dcp(base, output) == 0
    assert to_dcp(sources / "hf", tmp_path / name) == 0
    here, there = read_metadata(tmp_path / name), read_metadata(as_path(output))
    assert (there.tensors, there.tied, there.initial and there.initial.buffers) == (
        (here.tensors, here.tied, here.initial and here.initial.buffers)
    )
    assert {n: f for n, f in there.files.items() if n != ".metadata"} == {
        n: f for n, f in here.files.items() if n != ".metadata"
    }
    lies = f"converted/{name}" if name == "olmo2" else f"converted/{name}/{there.attempt}"
    assert_same_checkpoint(
        download(object_server, lies, tmp_path / "downloaded"), tmp_path / name, sources / "truth.pt"
    )
    assert not [key for key in object_server.keys("converted") if "claim" in key or "owner" in key]
    assert main(["verify", output]) == 0
    assert main(["verify", output, str(tmp_path / name)]) == 0
    assert main(["detect", output]) == 0
    before = object_server.keys("converted")
    assert to_dcp(base, output) == 2, "it is there already"
    assert object_server.keys("converted") == before


def test_one_write_becomes_a_plain_directory_there(object_server: ObjectServer, sources: Path, tmp_path: Path) -> None:
    step = sources / "ours"
    assert to_dcp(step, object_server.url("whole/olmo2"), "--whole") == 0
    found = download(object_server, "whole/olmo2", tmp_path / "found")
    assert to_dcp(step, tmp_path / "local", "--whole") == 0
    assert_same_checkpoint(found, tmp_path / "local", sources / "truth.pt")


def run_conversion(server: ObjectServer, base: str, output: str) -> None:
    server.use()
    assert to_dcp(base, output) == 0


def test_ranks_share_the_writing(object_server: ObjectServer, sources: Path, tmp_path: Path) -> None:
    base, output = put(object_server, sources / "hf", "bases/ranks"), object_server.url("converted/ranks")
    run_on_ranks(run_conversion, 2, tmp_path, object_server, base, output)
    found = download(object_server, "converted/ranks", tmp_path / "found")
    assert {path.name for path in found.glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}
    state = torch.load(sources / "truth.pt")
    loaded = load({name: torch.zeros_like(value) for name, value in state.items()}, found)
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


@pytest.mark.parametrize("name", ["killed", "step-0"])
def test_what_a_killed_conversion_leaves_is_no_checkpoint_and_is_swept(
    object_server: ObjectServer, sources: Path, name: str
) -> None:
    place = f"killed-{name}"
    output = object_server.url(f"{place}/{name}")
    command = ["-m", "shardsmith", "to-dcp", "--base-model", str(sources / "hf"), "--output-dir", output, "--quiet"]
    killed = 0
    while True:
        with proxied(object_server) as proxy:
            process: list[BaseProcess] = []

            def kill_after(
                request: Request, proxy: Proxy = proxy, process: list[Any] = process, number: int = killed
            ) -> None:
                writes = sum(one.method in ("PUT", "POST") for one in proxy.requests)
                if writes > number and request.method in ("PUT", "POST"):
                    process[0].kill()

            proxy.done = kill_after
            proxy.server.use()
            process.append(start_python(*command))
            process[0].join()
            code = process[0].exitcode
        object_server.use()
        if code == 0:
            break
        assert code == -signal.SIGKILL
        killed += 1
        if f"{name}/metadata.json" in object_server.keys(place):
            break  # it died after the commit
        with pytest.raises(CheckpointNotFoundError):
            read_metadata(as_path(output))
        sweep(as_path(object_server.url(place)))
        assert not object_server.keys(place), "its process is dead"
    assert killed > 2
    assert main(["verify", output]) == 0
    sweep(as_path(object_server.url(place)))
    assert not [key for key in object_server.keys(place) if "claim" in key or "owner" in key]


def run_loads(server: ObjectServer, urls: list[str], truth: Path, root: Path) -> None:
    server.use()
    folder = root / f"rank-{dist.get_rank()}"
    folder.mkdir()
    os.chdir(folder)
    expected = torch.load(truth)
    for sharding in ("fsdp2", "tp"):
        for url in urls:
            model = started("qwen2", sharding)
            report = load_initial(url, model=model, **options("qwen2"))
            assert report.tensors == len(expected)
            for name, tensor in gathered(model).items():
                assert torch.equal(tensor, expected[name]), (sharding, url, name)
            assert not verify_loaded(model, url, **options("qwen2")).loaded
    model = started("qwen2", "fsdp2")
    with Hooks(InitialLoad(urls[0], model=model, **options("qwen2"))) as hooks:
        hooks.resume()
    assert not [*Path().iterdir()], "something was written to the local disk"


def test_ranks_start_from_what_is_in_a_store(object_server: ObjectServer, sources: Path, tmp_path: Path) -> None:
    urls = [put(object_server, sources / "hf", "starts/hf"), object_server.url("starts/converted")]
    assert to_dcp(urls[0], urls[1]) == 0
    metadata = read_metadata(sources / "ours")
    put(object_server, sources / "ours", f"starts/step-1/{metadata.attempt}")
    obstore.put(object_server.client(), "starts/step-1/metadata.json", (sources / "ours/metadata.json").read_bytes())
    urls.append(object_server.url("starts/step-1"))
    object_server.client().delete(f"starts/step-1/{metadata.attempt}/metadata.json")
    run_on_ranks(run_loads, 2, tmp_path, object_server, urls, sources / "truth.pt", tmp_path)


def test_a_base_model_in_a_store_is_one_on_a_disk(object_server: ObjectServer, trained: Runs, tmp_path: Path) -> None:
    run = trained["qwen2", 2]
    base = put(object_server, run.base, "bases/qwen2")
    for name, one in (("remote", base), ("local", str(run.base))):
        places = ["--checkpoint", str(run.checkpoint), "--base-model", one, "--output-dir", str(tmp_path / name)]
        assert main(["to-hf", *places, "--quiet"]) == 0
    assert_same_exports(tmp_path / "remote", tmp_path / "local")
    exported = put(object_server, tmp_path / "local", "bases/exported")
    for one in (exported, str(tmp_path / "local")):
        for level in ("structure", "values", "model"):
            arguments = ["--checkpoint", str(run.checkpoint), "--base-model", one, "--level", level, "--trained"]
            assert main(["diagnose", *arguments]) == 0
    assert main(["verify", exported, str(tmp_path / "local"), "--logits", "--base-model", exported]) == 0


def assert_same_exports(found: Path, expected: Path) -> None:
    names = {str(path.relative_to(expected)) for path in expected.rglob("*") if path.is_file()}
    assert {str(path.relative_to(found)) for path in found.rglob("*") if path.is_file()} == names
    for name in names - {"shardsmith.json", "README.md"}:
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name


def run_export(server: ObjectServer, bases: list[str], root: Path) -> None:
    server.use()
    model = started("qwen2", "fsdp2")
    made = [HFExport(root / f"hf-{i}", model=model, base_model=base, when=at(1)) for i, base in enumerate(bases)]
    with Hooks(*made) as hooks:
        hooks.resume()
        hooks.step(1)


def test_live_exports_take_a_base_model_from_a_store(
    object_server: ObjectServer, sources: Path, tmp_path: Path
) -> None:
    shutil.copytree(sources / "hf", tmp_path / "base")
    (tmp_path / "base" / "notes").mkdir()
    (tmp_path / "base" / "notes" / "more.txt").write_text("of the base model")
    base = put(object_server, tmp_path / "base", "bases/live/base")
    run_on_ranks(run_export, 2, tmp_path, object_server, [base, str(tmp_path / "base")], tmp_path)
    assert_same_exports(tmp_path / "hf-0" / "step-1", tmp_path / "hf-1" / "step-1")
    assert (tmp_path / "hf-0" / "step-1" / "notes" / "more.txt").is_file()
    assert main(["to-dcp", "--base-model", f"{base}-missing", "--output-dir", str(tmp_path / "out")]) == 2
