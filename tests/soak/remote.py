"""The soak's job in an object store: with and without a cache on disks, through a proxy that is slow at times.

A process that has used the client of a store must not fork ranks, so whatever looks at the store is forked itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from shardsmith.ground.layout import METADATA_FILE, PROVENANCE_FILE, RETENTION_FILE, parse_step
from shardsmith.ground.remote_commit import attempt_of, find_remains
from shardsmith.ground.remote_path import RemotePath, as_path
from shardsmith.manifest.checkpoints import committed_steps
from tests.faulty_proxy import Fault, Request, proxied
from tests.object_server import ObjectServer, running_server
from tests.soak.job import Job
from tests.soak.kills import kill_at_random


@dataclass(frozen=True)
class RemoteJob(Job):
    """One run whose steps are in a store."""

    server: ObjectServer
    hosts: int
    """How many disks its ranks have; 0 for a run without a cache on disks."""

    @property
    def checkpoints(self) -> str:
        return self.server.url(f"{self.folder.name}/steps")

    @property
    def exports(self) -> str:
        return self.server.url(f"{self.folder.name}/hf")

    @property
    def save_options(self) -> dict[str, Any]:
        rank = dist.get_rank() if dist.is_initialized() else 0
        return {"local_cache": self.folder / f"disk-{rank % self.hosts}"} if self.hosts else {}

    def start(self) -> list[int]:
        self.server.use()
        return super().start()

    def committed(self) -> list[int]:
        disks = [self.folder / f"disk-{host}" for host in range(self.hosts)]
        on_all = set.intersection(*({*committed_steps(disk)} for disk in disks)) if disks else set()
        return sorted({*self._look(lambda: committed_steps(as_path(self.checkpoints))), *on_all})

    def leftovers(self) -> list[str]:
        places = [self.checkpoints, self.exports]
        found: list[str] = self._look(lambda: [str(one[0]) for p in places for one in find_remains(_remote(p))])
        on_disks = (path.name for path in self.folder.glob("disk-*/.*"))
        return [*found, *(name for name in on_disks if name != RETENTION_FILE)]

    def visible(self) -> Job:
        mirror = Job(self.folder / "mirror", self.ranks, self.steps)
        shutil.rmtree(mirror.folder, ignore_errors=True)
        self._look(lambda: _download(_remote(self.server.url(self.folder.name)), mirror.folder))
        return mirror

    def _look(self, act: Callable[[], Any]) -> Any:
        """What ``act`` returns in a process of its own, as JSON."""
        self.server.use()
        answer = Path(tempfile.mktemp(dir=self.folder.parent))
        if not (child := os.fork()):
            try:
                answer.write_text(json.dumps(act()))
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        text = answer.read_text()
        answer.unlink()
        return json.loads(text)


def kill_remote(work: Path, kills: int, until: float, chance: random.Random) -> Counter[str]:
    """As ``kill_at_random``, with steps in a store."""
    said, own = work / "server.json", os.getpid()
    if not (child := os.fork()):
        _serve(work / "server", said, chance.randrange(1 << 32))
    try:
        while not said.exists():
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "the server has ended"
            time.sleep(0.05)
        server, numbers = ObjectServer(**json.loads(said.read_text())), iter(range(1 << 30))

        def make(folder: Path, ranks: int, steps: int) -> Job:
            hosts = (0, 1, ranks)[next(numbers) % 3] if folder.name.startswith("run-") else 0
            folder.mkdir(parents=True, exist_ok=True)
            return RemoteJob(folder, ranks, steps, server, hosts)

        return kill_at_random(work, kills, until, chance, make)
    finally:
        if os.getpid() == own:  # a rank that was forked ends through here, too
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _serve(folder: Path, said: Path, seed: int) -> NoReturn:
    """Run server and proxy until the process is killed. It has the threads and the client, which must not be forked."""
    try:
        with running_server(folder) as server, proxied(server) as proxy:
            proxy.fault = slow_at_times(seed)
            said.with_suffix(".tmp").write_text(json.dumps(asdict(proxy.server)))
            said.with_suffix(".tmp").rename(said)
            signal.pause()
    finally:
        os._exit(1)


def slow_at_times(seed: int) -> Callable[[Request, int], Fault | None]:
    """Delay one request in four by up to 20 ms; all the others wait, too, as the proxy asks for one at a time."""
    chance = random.Random(seed)

    def fault(request: Request, seen: int) -> Fault | None:  # noqa: ARG001
        if chance.random() < 0.25:
            time.sleep(chance.uniform(0, 0.02))
        return None

    return fault


def _remote(url: str) -> RemotePath:
    path = as_path(url)
    assert isinstance(path, RemotePath)
    return path


def _download(run: RemotePath, mirror: Path) -> None:
    """Copy the steps and exports that exist, as a disk would have them."""
    for place in ("steps", "hf"):
        (mirror / place).mkdir(parents=True)
        for step in (run / place).iterdir():
            has_manifest = (step / METADATA_FILE).is_file()
            if not has_manifest and not (step / PROVENANCE_FILE).is_file():
                continue
            assert parse_step(step.name) is not None or place == "hf"
            files = step / (attempt_of(step) or "") if has_manifest else step
            for name in files.objects_below():
                target = mirror / place / step.name / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileNotFoundError):
                    target.write_bytes(files.store.get(f"{files.key}/{name}"))
            if has_manifest:
                (mirror / place / step.name / METADATA_FILE).write_bytes((step / METADATA_FILE).read_all())
