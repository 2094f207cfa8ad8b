from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from shardsmith.errors import IncompleteCheckpointError, TargetExistsError, WriteError
from shardsmith.ground import layout
from shardsmith.ground.commit import (
    Attempt,
    check_writable,
    place_file,
    place_link,
    remove,
    require_space,
    sweep,
    sync,
    withdraw_file,
    write_file,
    writing,
)

ID = "0123456789abcdef"


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def committed(target: Path, content: bytes = b"weights") -> Path:
    """A committed directory that holds one file."""
    with Attempt(target) as attempt:
        return attempt.commit({"data": write_file(attempt.directory / "data", content)})


def snapshot(path: Path) -> list[tuple[object, ...]]:
    """Everything that can be seen of a path and what is below it."""
    paths = [path, *sorted(path.rglob("*"))] if path.is_dir() and not path.is_symlink() else [path]
    return [(p, *p.lstat()[:2], p.lstat().st_mtime_ns, p.is_symlink() and os.readlink(p)) for p in paths]


def run_script(script: str, *args: object) -> subprocess.CompletedProcess[str]:
    """Run a Python program in a process of its own; it need not end well."""
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_target_is_visible_after_commit_and_not_before(tmp_path: Path) -> None:
    with Attempt(tmp_path / "step-3", ID) as attempt:
        size = write_file(attempt.directory / "data", b"abc")
        assert names(tmp_path) == {f".step-3.tmp-{ID}"}
        assert attempt.commit({"data": size}) == tmp_path / "step-3"
    assert names(tmp_path) == {"step-3"}
    assert (tmp_path / "step-3" / "data").read_bytes() == b"abc"


def test_missing_parents_are_made(tmp_path: Path) -> None:
    assert committed(tmp_path / "a" / "b" / "step-3").is_dir()


def test_files_in_subdirectories_are_committed(tmp_path: Path) -> None:
    with Attempt(tmp_path / "out") as attempt:
        (attempt.directory / "sub").mkdir()
        attempt.commit({"sub/data": write_file(attempt.directory / "sub" / "data", b"abc")})
    assert (tmp_path / "out" / "sub" / "data").read_bytes() == b"abc"


def test_a_parent_that_is_a_link_to_another_disk_is_fine(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to("disk")
    committed(tmp_path / "run" / "step-3")
    assert names(tmp_path / "disk") == {"step-3"}
    place_file(tmp_path / "run" / "mark", b"abc")
    place_link(tmp_path / "run" / "latest", "step-3")
    assert (tmp_path / "disk" / "mark").read_bytes() == b"abc"
    assert withdraw_file(tmp_path / "run" / "mark")
    assert not withdraw_file(tmp_path / "run" / "mark")
    assert names(tmp_path / "disk") == {"step-3", "latest"}


def test_a_link_to_a_file_is_not_followed_by_an_fsync(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    with pytest.raises(OSError, match="symbolic link"):
        sync(tmp_path / "link")


LISTING_FAULTS: list[tuple[Callable[[Path], object], str]] = [
    (lambda d: (d / "data").unlink(), "data: missing"),
    (lambda d: (d / "data").write_bytes(b"ab"), "data: 2 bytes, expected 3 bytes"),
    (lambda d: (d / "data").write_bytes(b""), "data: 0 bytes, expected 3 bytes"),
    (lambda d: (d / "data").write_bytes(b"abcd"), "data: 4 bytes, expected 3 bytes"),
    (lambda d: (d / "stale").write_bytes(b"ab"), "stale: 2 bytes that nobody meant to write"),
    (lambda d: (d / ".hidden").touch(), ".hidden: 0 bytes that nobody meant to write"),
    (lambda d: (d / "folder").mkdir(), "folder: drwx"),
    (lambda d: ((d / "data").unlink(), (d / "data").mkdir()), "data: drwx"),
    # of the right size, but not a file: a link's size is the length of where it points, a FIFO's is 0
    (lambda d: ((d / "data").unlink(), (d / "data").symlink_to("/xy")), "data: lrwx"),
    (lambda d: ((d / "empty").unlink(), os.mkfifo(d / "empty")), "empty: prw"),
    (lambda d: ((d / "sub" / "data").unlink(), (d / "sub").rmdir()), "sub/data: missing"),
    (lambda d: (d / "sub" / "more").touch(), "sub/more: 0 bytes that nobody meant to write"),
    (lambda d: (d / "link").symlink_to("sub"), "link: lrwx"),
]


@pytest.mark.parametrize(("damage", "text"), LISTING_FAULTS, ids=[text for _, text in LISTING_FAULTS])
def test_a_directory_that_holds_something_else_is_not_committed(
    tmp_path: Path, damage: Callable[[Path], object], text: str
) -> None:
    with Attempt(tmp_path / "out") as attempt:
        (attempt.directory / "sub").mkdir()
        for name, content in {"data": b"abc", "empty": b"", "sub/data": b"abc"}.items():
            write_file(attempt.directory / name, content)
        damage(attempt.directory)
        with pytest.raises(IncompleteCheckpointError, match="not committed") as caught:
            attempt.commit({"data": 3, "empty": 0, "sub/data": 3})
    assert text in str(caught.value)
    assert names(tmp_path) == set()


def test_an_attempt_that_raises_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupted() -> None:
        with Attempt(tmp_path / "step-3") as attempt:
            write_file(attempt.directory / "data", b"abc")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == set()


def test_an_attempt_that_is_not_committed_leaves_nothing_behind(tmp_path: Path) -> None:
    with Attempt(tmp_path / "step-3") as attempt:
        write_file(attempt.directory / "data", b"abc")
    assert names(tmp_path) == set()


def test_two_attempts_never_share_a_directory(tmp_path: Path) -> None:
    with Attempt(tmp_path / "step-3", ID) as first:
        write_file(first.directory / "data", b"abc")
        with pytest.raises(WriteError, match="making the directory failed: File exists"):
            Attempt(tmp_path / "step-3", ID)
        assert names(first.directory) == {"data"}


EXISTING: dict[str, Callable[[Path], object]] = {
    "file": lambda p: p.write_bytes(b"mine"),
    "empty file": lambda p: p.touch(),
    "empty directory": lambda p: p.mkdir(),
    "directory with files": lambda p: (p.mkdir(), (p / "mine").write_bytes(b"mine")),
    "link to a directory": lambda p: (p.with_name("elsewhere").mkdir(), p.symlink_to("elsewhere")),
    "link to a file": lambda p: (p.with_name("elsewhere").touch(), p.symlink_to("elsewhere")),
    "dangling link": lambda p: p.symlink_to("nowhere"),
    "link to itself": lambda p: p.symlink_to(p.name),
    "FIFO": lambda p: os.mkfifo(p),
    "committed checkpoint": committed,
}


@pytest.mark.parametrize("kind", EXISTING)
def test_an_existing_target_is_refused_and_left_as_it_is(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "step-3"
    EXISTING[kind](target)
    before = snapshot(target)
    with pytest.raises(TargetExistsError, match="left as it is"):
        Attempt(target)
    assert snapshot(target) == before
    assert not any(map(layout.is_leftover, names(tmp_path)))


@pytest.mark.parametrize("kind", EXISTING)
def test_a_target_that_appears_before_the_commit_is_left_as_it_is(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "step-3"
    with Attempt(target) as attempt:
        size = write_file(attempt.directory / "data", b"abc")
        EXISTING[kind](target)
        before = snapshot(target)
        with pytest.raises(TargetExistsError):
            attempt.commit({"data": size})
    assert snapshot(target) == before
    assert not any(map(layout.is_leftover, names(tmp_path)))


@pytest.mark.parametrize("racers", [2, 8])
def test_of_threads_that_race_for_a_target_exactly_one_wins(tmp_path: Path, racers: int) -> None:
    for i in range(100 // racers):
        barrier = Barrier(racers)

        def race(racer: int, target: Path = tmp_path / f"step-{i}", barrier: Barrier = barrier) -> int:
            try:
                with Attempt(target) as attempt:
                    size = write_file(attempt.directory / "data", bytes([racer]) * 10)
                    barrier.wait()
                    attempt.commit({"data": size})
            except TargetExistsError:
                return 0
            return racer + 1

        with ThreadPoolExecutor(racers) as pool:
            (winner,) = filter(None, pool.map(race, range(racers)))
        assert (tmp_path / f"step-{i}" / "data").read_bytes() == bytes([winner - 1]) * 10
    assert names(tmp_path) == {f"step-{i}" for i in range(100 // racers)}


RACE = """
    import os, sys, time
    from pathlib import Path
    from shardsmith.ground.commit import Attempt, sweep, write_file
    from shardsmith.errors import TargetExistsError

    parent, racers, rounds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])

    def race(racer):
        for i in range(rounds):
            try:
                with Attempt(parent / f"step-{i}") as attempt:
                    sweep(parent)
                    attempt.commit({"data": write_file(attempt.directory / "data", str(racer).encode() * 10)})
                os.write(1, f"{i} {racer}\\n".encode())
            except TargetExistsError:
                pass

    for racer in range(racers):
        if os.fork() == 0:
            try:
                race(racer)
            except BaseException as error:
                os.write(2, repr(error).encode())
            os._exit(0)
    for _ in range(racers):
        os.wait()
"""


def test_of_processes_that_race_and_sweep_exactly_one_wins_each_target(tmp_path: Path) -> None:
    done = run_script(RACE, tmp_path, 4, 100)
    assert done.stderr == ""
    winners = [line.split() for line in done.stdout.splitlines()]
    assert sorted(int(step) for step, _ in winners) == list(range(100))
    for step, racer in winners:
        assert (tmp_path / f"step-{step}" / "data").read_text() == racer * 10
    assert names(tmp_path) == {f"step-{i}" for i in range(100)}


HOLDER = """
    import os, sys
    from pathlib import Path
    from shardsmith.ground.commit import Attempt, write_file

    attempt = Attempt(Path(sys.argv[1]))
    write_file(attempt.directory / "data", b"abc")
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process with an attempt at ``step-3`` that is under way."""
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(tmp_path / "step-3")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def test_sweep_leaves_the_attempt_of_a_living_process_and_removes_that_of_a_dead_one(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    (attempt,) = tmp_path.iterdir()
    assert sweep(tmp_path) == []
    assert names(attempt) == {"data"}
    holder.kill()
    holder.wait()
    assert sweep(tmp_path) == [attempt]
    assert names(tmp_path) == set()


def test_sweep_leaves_an_attempt_of_its_own_process(tmp_path: Path) -> None:
    with Attempt(tmp_path / "step-3") as attempt:
        assert sweep(tmp_path) == []
        assert attempt.commit({}).is_dir()


def test_an_attempt_is_not_lost_to_a_sweep_that_runs_all_the_time(tmp_path: Path) -> None:
    barrier = Barrier(2)

    def sweep_until_done() -> None:
        barrier.wait()
        while not (tmp_path / "done").exists():
            sweep(tmp_path)

    with ThreadPoolExecutor(1) as pool:
        sweeping = pool.submit(sweep_until_done)
        barrier.wait()
        try:
            for i in range(100):
                remove(committed(tmp_path / f"step-{i}"))
        finally:
            (tmp_path / "done").touch()
        sweeping.result()
    assert names(tmp_path) == {"done"}


FOREIGN = [
    "step-3",
    "step-3.tmp",
    ".step-3.tmp",
    f"step-3.tmp-{ID}",
    f".step-3.tmp-{ID[:-1]}",
    f".step-3.tmp-{ID}0",
    f".step-3.tmp-{ID.upper()}",
    f".step-3.tmp-{ID}.bak",
    f".step-3.damaged-{ID}",
    f".step-3.temp-{ID}",
    f"..tmp-{ID}",
    f".step-3.tmp-{ID}\n",
    "user-data",
]


def test_sweep_touches_nothing_that_we_did_not_name(tmp_path: Path) -> None:
    for name in FOREIGN:
        (tmp_path / name).mkdir()
    (tmp_path / f".file.tmp-{ID}").write_bytes(b"mine")
    (tmp_path / f".link.tmp-{ID}").symlink_to("user-data")
    before = snapshot(tmp_path)
    assert sweep(tmp_path) == []
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["latest", ".retention.json", "cache-of.txt", "alone-since.txt", "metadata.json"])
def test_sweep_removes_a_file_that_was_not_put_in_its_place_and_not_the_one_that_was(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"mine")
    layout.temporary_path(tmp_path / name, ID).write_bytes(b"half of it")
    assert sweep(tmp_path) == []
    assert names(tmp_path) == {name}


def test_sweep_deletes_no_file_that_a_leftover_links_to(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "data").write_bytes(b"mine")
    leftover = tmp_path / f".step-3.tmp-{ID}"
    leftover.mkdir()
    (leftover / "link").symlink_to("../mine")
    assert sweep(tmp_path) == [leftover]
    assert (tmp_path / "mine" / "data").read_bytes() == b"mine"


def test_sweep_of_an_absent_directory_does_nothing(tmp_path: Path) -> None:
    assert sweep(tmp_path / "absent") == []


def test_remove_goes_through_trash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = committed(tmp_path / "step-3")
    seen: list[set[str]] = []
    unlink = os.unlink

    def look_and_unlink(path: str, *, dir_fd: int | None = None) -> None:
        seen.append(names(tmp_path))
        unlink(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", look_and_unlink)
    remove(target)
    ((trash,),) = seen
    assert trash.startswith(".step-3.trash-")
    assert layout.is_leftover(trash)
    assert names(tmp_path) == set()


KILLED_REMOVE = """
    import os, signal, sys
    from pathlib import Path
    from shardsmith.ground.commit import remove

    left = [int(sys.argv[2])]

    def kill(event, args):
        if event in ("os.rename", "os.remove", "os.rmdir"):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(kill)
    remove(Path(sys.argv[1]))
"""


@pytest.mark.parametrize("survived", range(5))
def test_a_deletion_killed_half_way_is_never_visible_and_a_sweep_finishes_it(tmp_path: Path, survived: int) -> None:
    with Attempt(tmp_path / "step-3") as attempt:
        attempt.commit({name: write_file(attempt.directory / name, b"abc") for name in ("a", "b", "c")})
    done = run_script(KILLED_REMOVE, tmp_path / "step-3", survived)
    assert done.returncode == -signal.SIGKILL
    visible = set() if survived else {"step-3"}
    assert {name for name in names(tmp_path) if not layout.is_leftover(name)} == visible
    assert all(names(tmp_path / name) == {"a", "b", "c"} for name in visible)
    sweep(tmp_path)
    assert names(tmp_path) == visible


def test_remove_of_what_is_not_there_is_a_write_error(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="step-3: deletion failed: No such file"):
        remove(tmp_path / "step-3")


def test_write_file_is_exclusive(tmp_path: Path) -> None:
    assert write_file(tmp_path / "data", b"first") == 5
    with pytest.raises(WriteError, match="data: write failed: File exists"):
        write_file(tmp_path / "data", b"second")
    assert (tmp_path / "data").read_bytes() == b"first"


@pytest.mark.parametrize("goal", ["victim", "nowhere"])
def test_write_file_follows_no_link(tmp_path: Path, goal: str) -> None:
    (tmp_path / "victim").write_bytes(b"mine")
    (tmp_path / "data").symlink_to(goal)
    with pytest.raises(WriteError, match="write failed"):
        write_file(tmp_path / "data", b"ours")
    assert (tmp_path / "victim").read_bytes() == b"mine"
    assert names(tmp_path) == {"victim", "data"}


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077], ids=oct)
def test_modes_follow_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        target = committed(tmp_path / "runs" / "step-3")
    finally:
        os.umask(before)
    assert stat.S_IMODE((target / "data").stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE(target.stat().st_mode) == 0o777 & ~umask
    assert stat.S_IMODE(target.parent.stat().st_mode) == 0o777 & ~umask


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO], ids=errno.errorcode.get)
def test_write_error_names_path_phase_and_cause_and_the_free_space_if_that_is_why(tmp_path: Path, number: int) -> None:
    with pytest.raises(WriteError) as caught, writing(tmp_path / "a" / "b", "copying"):
        raise OSError(number, os.strerror(number))
    assert caught.value.errno == number
    assert f"{tmp_path / 'a' / 'b'}: copying failed: {os.strerror(number)}" in str(caught.value)
    assert (f"GB free on {tmp_path}" in str(caught.value)) == (number != errno.EIO)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS], ids=errno.errorcode.get)
def test_a_write_that_is_not_allowed_names_the_folder_and_what_to_do(tmp_path: Path, number: int) -> None:
    with pytest.raises(WriteError) as caught, writing(tmp_path / ".step-5.tmp-1", "making the directory"):
        raise OSError(number, os.strerror(number))
    assert str(caught.value).endswith(
        f"{os.strerror(number)}; this user may not write to {tmp_path}: choose another directory, or change its "
        "permissions"
    )


FULL = """
    import resource, signal, sys
    from pathlib import Path
    from shardsmith.ground.commit import Attempt, write_file

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    with Attempt(Path(sys.argv[1])) as attempt:
        attempt.commit({"small": write_file(attempt.directory / "small", b"x" * 1000)})
    with Attempt(Path(sys.argv[2])) as attempt:
        write_file(attempt.directory / "large", b"x" * 1001)
"""


def test_a_file_system_that_takes_no_more_gives_an_error_that_says_so_and_nothing_is_left(tmp_path: Path) -> None:
    done = run_script(FULL, tmp_path / "step-1", tmp_path / "step-2")
    assert "WriteError" in done.stderr
    assert "large: write failed: File too large (" in done.stderr
    assert f"GB free on {tmp_path}" in done.stderr
    assert names(tmp_path) == {"step-1"}


def test_an_attempt_below_a_file_is_a_write_error(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(WriteError, match="making the directory failed"):
        Attempt(tmp_path / "run" / "step-3")


class Recorder:
    """Lets every fsync and rename happen, and keeps their order by path."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[str, Path]] = []
        self._fsync, self._rename = os.fsync, os.rename
        monkeypatch.setattr(os, "fsync", self.fsync)
        monkeypatch.setattr(os, "rename", self.rename)  # Path.rename calls it

    def fsync(self, descriptor: int) -> None:
        self.events.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
        self._fsync(descriptor)

    def rename(self, source: str | Path, target: str | Path) -> None:
        self.events.append(("rename", Path(source)))
        self._rename(source, target)


def test_everything_is_fsynced_before_the_rename_and_the_parent_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(monkeypatch)
    with Attempt(tmp_path / "step-3") as attempt:
        (attempt.directory / "sub").mkdir()
        files = {name: write_file(attempt.directory / name, b"abc") for name in ("a", "b", "sub/c")}
        attempt.commit(files)
    at = recorder.events.index(("rename", attempt.directory))
    before, after = recorder.events[:at], recorder.events[at + 1 :]
    for name in (".", "a", "b", "sub", "sub/c"):
        assert ("fsync", attempt.directory / name) in before
    assert max(before.index(("fsync", attempt.directory / name)) for name in files) < min(
        before.index(("fsync", attempt.directory / name)) for name in (".", "sub")
    )
    assert after == [("fsync", tmp_path)]


def test_directories_that_are_made_on_the_way_are_fsynced_in_their_parents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(monkeypatch)
    with Attempt(tmp_path / "run" / "checkpoints" / "step-3"):
        assert {("fsync", tmp_path), ("fsync", tmp_path / "run")} <= set(recorder.events)


@pytest.mark.parametrize("nth", range(4))
def test_an_fsync_that_fails_fails_the_attempt_and_nothing_becomes_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    # 0 and 1: the files, 2: the directory, 3: its parent, which already shows the new name
    real, calls = os.fsync, iter(range(100))

    def fail_once(descriptor: int) -> None:
        if next(calls) == nth:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fail_once)
    with pytest.raises(WriteError, match="Input/output error"), Attempt(tmp_path / "step-3") as attempt:
        attempt.commit({name: write_file(attempt.directory / name, b"abc") for name in ("a", "b")})
    assert names(tmp_path) == set()
    assert next(calls) == nth + 1  # it was not tried again
    committed(tmp_path / "step-3")


def test_a_place_that_can_be_written_to_is_made_and_left_empty(tmp_path: Path) -> None:
    check_writable(tmp_path / "run" / "checkpoints")
    assert names(tmp_path / "run" / "checkpoints") == set()


def test_the_proof_minds_nothing_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "probe").write_bytes(b"mine")
    check_writable(tmp_path)
    assert names(tmp_path) == {"probe"}


KILLED_PROOF = """
    import os, signal, sys
    from pathlib import Path
    from shardsmith.ground.commit import check_writable

    left = [int(sys.argv[2])]

    def kill(event, args):
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") and sys.argv[1] in str(args[0]):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(kill)
    check_writable(Path(sys.argv[1]))
"""


def test_a_proof_killed_anywhere_is_not_in_the_way_of_the_next(tmp_path: Path) -> None:
    killed = 0
    while run_script(KILLED_PROOF, tmp_path, killed).returncode == -signal.SIGKILL:
        killed += 1
        assert all(map(layout.is_leftover, names(tmp_path)))
        check_writable(tmp_path)
        sweep(tmp_path)
        assert names(tmp_path) == set()
    assert killed >= 6


def test_a_place_that_cannot_be_written_to_is_a_write_error(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(WriteError, match=r"run/\.probe"):
        check_writable(tmp_path / "run")


def test_sync_of_what_is_not_there_raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        sync(tmp_path / "absent")


def test_a_file_system_without_room_for_all_of_it_is_refused_beforehand(tmp_path: Path) -> None:
    require_space(tmp_path, 1)
    with pytest.raises(WriteError, match=r"making room for \d+ bytes failed: No space .*GB free") as caught:
        require_space(tmp_path, 1 << 60)
    assert caught.value.errno == errno.ENOSPC
