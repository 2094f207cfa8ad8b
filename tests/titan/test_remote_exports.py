"""Exports of TorchTitan's runs in an object store, where its own folders cannot be."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import obstore

from tests.object_server import ObjectServer
from tests.titan.jobs import Assets, Job, error_of, run_jobs

EXPORT = {"ema_decay": 0.5, "export_interval": 2, "export_dtype": "float32", "export_keep": 1}


def files_in(folder: Path) -> dict[str, bytes]:
    """What is in its exports, but for their records, which hold times."""
    paths = [path for path in folder.glob("*/**/*") if path.is_file() and path.name != "shardsmith.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@contextlib.contextmanager
def using(server: ObjectServer) -> Iterator[None]:
    """On a rank: the server is the one that the environment names."""
    server.use()
    yield


def test_exports_go_there_and_a_dump_folder_there_is_refused(
    object_server: ObjectServer, assets: Assets, tmp_path: Path
) -> None:
    place, base = object_server.url("titan"), object_server.url("titan-base/assets")
    for path in assets.hf.iterdir():
        obstore.put(object_server.client(), f"titan-base/assets/{path.name}", path.read_bytes())
    disk, store = (
        Job(run=tmp_path / name, hooks={**EXPORT, **more}, within=partial(using, object_server))
        for name, more in (("disk", {}), ("store", {"export_folder": place, "export_base_model": base}))
    )
    inside = Job(run=tmp_path / "inside", hooks=EXPORT, options=["--checkpoint.folder=s3://bucket/steps"])
    run_jobs(assets, 2, tmp_path, disk, store, inside)
    assert [error_of(job) for job in (disk, store)] == ["", ""]
    expected = files_in(disk.run / "hf")
    found = {name: bytes(obstore.get(object_server.client(), f"titan/{name}").bytes()) for name in expected}
    assert found == expected
    names = {name.partition("/")[0] for name in object_server.keys("titan")}
    assert names == {".retention.json", "step-4", "step-4-ema"}, "the older one was removed"
    for rank in (0, 1):
        assert "give a local dump_folder. Exports alone can go to an object store" in error_of(inside, rank)
