"""Attempts in an object store: who wins, what stays of one that died, and what a bad line to the store does."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from obstore.store import S3Store
from torch.multiprocessing import ProcessExitedException

from shardsmith import StorageError, TargetExistsError, WriteError
from shardsmith.errors import IncompleteCheckpointError
from shardsmith.ground import object_store, remote_commit, remote_owner
from shardsmith.ground.commit import begin_attempt, remove, sweep
from shardsmith.ground.layout import METADATA_FILE
from shardsmith.ground.new_file import new_file
from shardsmith.ground.remote_commit import RemoteAttempt, check_writable, committed_steps
from shardsmith.ground.remote_export import RemoteDirectory
from shardsmith.ground.remote_path import RemotePath, as_path
from shardsmith.ground.stores import use_client
from shardsmith.ground.unfinished_uploads import _Bucket, abort_uploads
from tests.faulty_proxy import Fault, Request, proxied
from tests.object_server import ObjectServer
from tests.ranks import run_on_ranks

HTTP = {"allow_http": True}


@pytest.fixture
def place(object_server: ObjectServer, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> RemotePath:
    """A run's place of its own."""
    monkeypatch.setattr(object_store, "_clients", {})
    object_server.use()
    path = as_path(object_server.url(f"commit/{request.node.name}".replace("[", "-").replace("]", "")))
    assert isinstance(path, RemotePath)
    return path


def write(attempt: RemoteAttempt, content: bytes = b"shard") -> dict[str, int]:
    """Its files, without the last step."""
    manifest = f'{{"attempt": "{attempt.id}"}}'.encode()
    return {name: attempt.write(name, data) for name, data in (("a.bin", content), (METADATA_FILE, manifest))}


@pytest.mark.parametrize("nbytes", [1000, 20 << 20], ids=["below a part", "several parts"])
def test_what_was_written_may_change_before_it_is_sent(object_server: ObjectServer, nbytes: int) -> None:
    object_server.use()
    path, data = as_path(object_server.url(f"buffers/{nbytes}")), bytearray(b"a" * nbytes)
    file = new_file(path, nbytes)
    file.write(memoryview(data))
    data[:] = b"b" * nbytes
    file.write(memoryview(data))
    data[:] = b"c" * nbytes
    file.finish()
    assert path.read_bytes() == b"a" * nbytes + b"b" * nbytes


def test_a_step_exists_once_its_manifest_does(place: RemotePath) -> None:
    attempt = RemoteAttempt(place / "step-5")
    files = write(attempt)
    assert committed_steps(place, METADATA_FILE) == []
    attempt.commit(files)
    assert committed_steps(place, METADATA_FILE) == [5]
    assert (place / "step-5" / "a.bin").read_bytes() == b"shard"
    assert (place / "step-5").sizes() == {"a.bin": 5, METADATA_FILE: files[METADATA_FILE]}
    with pytest.raises(TargetExistsError, match="exists already"):
        begin_attempt(place / "step-5")


def test_of_many_that_race_one_wins_and_its_files_are_there(place: RemotePath) -> None:
    attempts = [RemoteAttempt(place / "step-5") for _ in range(8)]
    files = [write(attempt, attempt.id.encode()) for attempt in attempts]
    at_once = threading.Barrier(len(attempts))

    def commit(i: int) -> bool:
        at_once.wait()
        try:
            attempts[i].commit(files[i])
        except TargetExistsError:
            attempts[i].abandon()
            return False
        return True

    with ThreadPoolExecutor(len(attempts)) as pool:
        wins = [*pool.map(commit, range(len(attempts)))]
    won = [attempt.id for attempt, is_first in zip(attempts, wins, strict=True) if is_first]
    assert len(won) == 1
    assert (place / "step-5" / "a.bin").read_bytes() == won[0].encode()
    sweep(place)
    keys = {one.key.removeprefix(f"{place.key}/step-5/") for one in place.store.objects(place.key)}
    assert keys == {f"{won[0]}/a.bin", METADATA_FILE}


@pytest.mark.parametrize("fault", ["missing", "longer", "foreign"])
def test_a_listing_that_differs_from_what_was_written_is_not_committed(place: RemotePath, fault: str) -> None:
    attempt = RemoteAttempt(place / "step-5")
    files = write(attempt)
    if fault == "missing":
        files["b.bin"] = 3
    elif fault == "longer":
        attempt.write("a.bin", b"something else")
    else:
        attempt.write("c.bin", b"")
    with pytest.raises(IncompleteCheckpointError, match=r"not committed\n  [abc]\.bin"):
        attempt.commit(files)
    assert committed_steps(place, METADATA_FILE) == []


def test_what_is_removed_is_wholly_gone_and_another_attempt_stays(place: RemotePath) -> None:
    first = RemoteAttempt(place / "step-5")
    second = RemoteAttempt(place / "step-5")
    files = write(second)
    first.commit(write(first))
    assert remove(place / "step-5")
    assert committed_steps(place, METADATA_FILE) == []
    second.commit(files)
    assert (place / "step-5" / "a.bin").read_bytes() == b"shard"
    assert not remove(place / "step-6")


def run_killed(server: ObjectServer, url: str) -> None:
    server.use()
    attempt = RemoteAttempt(as_path(url) / "step-5")  # type: ignore[arg-type]
    write(attempt)
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_process_left_goes_at_once_and_what_lives_stays(
    object_server: ObjectServer, place: RemotePath, tmp_path: Path
) -> None:
    with pytest.raises(ProcessExitedException):
        run_on_ranks(run_killed, 1, tmp_path, object_server, str(place))
    alive = RemoteAttempt(place / "step-10")
    write(alive)
    left = {one.key for one in place.store.objects(f"{place.key}/step-5")}
    assert len(left) == 2, "the file, and whose it is"
    assert [path.parent.name for path in sweep(place)] == ["step-5"]
    assert not place.store.objects(f"{place.key}/step-5")
    assert len(place.store.objects(f"{place.key}/step-10")) == 2


def run_killed_in_an_upload(server: ObjectServer, url: str) -> None:
    server.use()
    attempt = RemoteAttempt(as_path(url) / "step-5")  # type: ignore[arg-type]
    claimed = RemoteDirectory(as_path(url) / "export 5%")  # type: ignore[arg-type]
    for directory in (attempt.directory, claimed.target):
        upload = new_file(directory / "größe 1+2.bin", 64 << 20)
        upload.write(memoryview(bytes(40 << 20)))  # more than what is not sent yet
    os.kill(os.getpid(), signal.SIGKILL)


def test_uploads_that_a_killed_process_has_not_finished_are_aborted(
    object_server: ObjectServer, place: RemotePath, tmp_path: Path
) -> None:
    with pytest.raises(ProcessExitedException):
        run_on_ranks(run_killed_in_an_upload, 1, tmp_path, object_server, str(place))
    alive = RemoteAttempt(place / "step-10")
    going_on = new_file(alive.directory / "a.bin")
    going_on.write(memoryview(bytes(40 << 20)))
    bucket = _Bucket.of(place)
    assert bucket is not None
    assert len({key for key, _ in bucket.uploads(place.key)}) == 3
    assert len(sweep(place)) == 2
    assert [key for key, _ in bucket.uploads(place.key)] == [f"{alive.directory.key}/a.bin"]
    going_on.finish()
    assert alive.directory.sizes() == {"a.bin": 40 << 20}


def test_a_later_export_aborts_the_uploads_of_a_former_one(
    object_server: ObjectServer, place: RemotePath, tmp_path: Path
) -> None:
    with pytest.raises(ProcessExitedException):
        run_on_ranks(run_killed_in_an_upload, 1, tmp_path, object_server, str(place))
    bucket = _Bucket.of(place)
    assert bucket is not None
    assert [*bucket.uploads(f"{place.key}/export")]
    with RemoteDirectory(place / "export 5%"):
        assert not [*bucket.uploads(f"{place.key}/export")]


def test_a_client_of_ones_own_with_a_prefix_aborts_the_right_uploads(
    object_server: ObjectServer, place: RemotePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "_clients", {})
    use_client("s3://mine", S3Store(config={**object_server.client().config}, prefix=place.key, client_options=HTTP))
    other, mine = as_path("s3://mine/run-2"), as_path("s3://mine/run")
    uploads = [new_file(run / "a b.bin") for run in (other, mine)]
    for upload in uploads:
        upload.write(memoryview(bytes(40 << 20)))
    assert isinstance(mine, RemotePath)
    assert abort_uploads(mine) == 1
    with pytest.raises(FileNotFoundError):
        uploads[1].finish()
    uploads[0].finish()
    assert [one.key for one in other.store.objects("")] == ["run-2/a b.bin"]  # type: ignore[attr-defined]


def test_uploads_that_cannot_be_listed_do_not_stop_a_sweep(
    object_server: ObjectServer, place: RemotePath, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    attempt = RemoteAttempt(place / "step-5")
    write(attempt)
    attempt._release()
    monkeypatch.setattr(object_store, "_clients", {})
    with proxied(object_server) as proxy, caplog.at_level("INFO"):
        proxy.server.use()
        proxy.fault = lambda request, seen: "503" if "uploads=&" in request.path else None  # noqa: ARG005
        assert sweep(place) == [attempt.directory]
    assert "unfinished uploads" in caplog.text
    assert object_server.secret_key not in caplog.text
    assert "Signature" not in caplog.text


@pytest.mark.parametrize("kind", ["step", "export", "probe"])
def test_a_sweep_of_another_thread_leaves_what_has_just_begun(
    object_server: ObjectServer, place: RemotePath, kind: str
) -> None:
    """Without the probe the store would be refused as one that knows no conditional writes."""
    begin: dict[str, Callable[[], RemoteAttempt | RemoteDirectory | None]] = {
        "step": lambda: RemoteAttempt(place / "step-5"),
        "export": lambda: RemoteDirectory(place / "hf"),
        "probe": lambda: check_writable(place),
    }
    with proxied(object_server) as proxy:
        proxy.server.use()
        proxy.done = lambda request: sweep(place) if request.method == "PUT" else None
        made = begin[kind]()
    left = [key.rpartition(".")[2] for key in object_server.keys(place.key)]
    assert left == {"step": ["owner"], "export": ["claim"], "probe": []}[kind]
    if made is not None:
        made.abandon()


def test_a_probe_goes_when_its_process_is_dead_and_not_before(place: RemotePath) -> None:
    mine = json.loads(remote_owner.this_process())
    probe = place / "below" / f".probe-{'0' * 16}"
    other = subprocess.Popen(["sleep", "600"])
    try:
        started = remote_owner._start_of(other.pid)
        probe.store.put(probe.key, json.dumps({**mine, "pid": other.pid, "started": started}).encode())
        sweep(place)
        assert probe.is_file()
    finally:
        other.kill()
        other.wait()
    sweep(place)
    assert not probe.is_file()


def test_a_bucket_is_a_directory_and_no_file(place: RemotePath) -> None:
    bucket = as_path(place.store.url)
    (place / "one").write_text("object")
    assert bucket.is_dir()
    assert not bucket.is_file()
    assert stat.S_ISDIR(bucket.stat().st_mode)
    assert "commit" in [path.name for path in bucket.iterdir()]


def test_an_attempt_of_another_host_goes_by_its_age(place: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = RemoteAttempt(place / "step-5")
    write(attempt)
    attempt._release()
    monkeypatch.setattr(remote_owner, "_host", lambda: "another boot")
    assert sweep(place) == []
    monkeypatch.setattr(remote_commit, "ABANDONED_AFTER", timedelta(seconds=-60))
    assert sweep(place) == [attempt.directory]


def test_what_was_set_aside_is_never_swept(place: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = RemoteAttempt(place / "step-5")
    attempt.commit(write(attempt))
    aside = remote_commit.set_aside(place / "step-5", "damaged")
    monkeypatch.setattr(remote_commit, "ABANDONED_AFTER", timedelta(seconds=-60))
    assert sweep(place) == []
    assert aside.name == f"metadata.damaged-{attempt.id}.json"
    assert (attempt.directory / "a.bin").read_bytes() == b"shard"


@pytest.mark.parametrize("fault", ["503", "drop", "lost", "cut"])
@pytest.mark.parametrize("method", ["PUT", "GET", "HEAD", "DELETE"])
def test_one_bad_answer_to_each_request_does_no_harm(
    object_server: ObjectServer, place: RemotePath, monkeypatch: pytest.MonkeyPatch, method: str, fault: Fault
) -> None:
    monkeypatch.setattr(object_store, "_clients", {})

    def once(request: Request, seen: int) -> Fault | None:
        return fault if request.method == method and seen == 0 else None

    with proxied(object_server) as proxy:
        proxy.server.use()
        proxy.fault = once
        attempt = RemoteAttempt(place / "step-5")
        attempt.commit(write(attempt))
        assert (place / "step-5" / "a.bin").read_bytes() == b"shard"
        assert committed_steps(place, METADATA_FILE) == [5]
        assert remove(place / "step-5")
        assert not place.store.objects(place.key)


def test_a_store_that_stays_bad_is_one_error_and_works_again_later(
    object_server: ObjectServer, place: RemotePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "_clients", {})
    monkeypatch.setattr(object_store, "_RETRIES", {**object_store._RETRIES, "max_retries": 1})
    with proxied(object_server) as proxy:
        proxy.server.use()
        proxy.fault = lambda request, seen: "503"  # noqa: ARG005
        with pytest.raises(WriteError, match="503") as failed:
            begin_attempt(place / "step-5")
        assert isinstance(failed.value.__cause__, StorageError)
        assert len(proxy.requests) <= 8
        proxy.fault = lambda request, seen: None  # noqa: ARG005
        attempt = RemoteAttempt(place / "step-5")
        attempt.commit(write(attempt))


def test_an_upload_that_is_given_up_leaves_nothing(place: RemotePath) -> None:
    from shardsmith.ground.new_file import new_file

    file = new_file(place / "x")
    file.write(memoryview(bytes(20 << 20)))
    file.close()
    assert not place.store.objects(place.key)
    done = new_file(place / "x")
    done.write(memoryview(bytes(20 << 20)))
    done.finish()
    done.close()
    assert [one.size for one in place.store.objects(place.key)] == [20 << 20]
