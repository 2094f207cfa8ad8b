"""A ShardedCheckpointManager whose run is in an object store: what it gives on a disk, by the same commit."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any, Literal

import obstore
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.multiprocessing import ProcessExitedException
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from shardsmith import CorruptCheckpointError, RankFailedError, ShardedCheckpointManager, StorageError, UsageError
from shardsmith.cli import main
from shardsmith.ground import object_store
from shardsmith.ground.remote_path import as_path
from shardsmith.hooks import EMA
from shardsmith.manifest.checkpoints import committed_steps, find_damage
from shardsmith.manifest.metadata import read_metadata
from tests.faulty_proxy import Fault, Proxy, Request, proxied
from tests.managed_runs import Run, run_steps, status_of
from tests.object_server import ObjectServer
from tests.ranks import run_on_ranks

BACKENDS = ["dcp", "per_rank"]
Backend = Literal["dcp", "per_rank"]
States = dict[str, dict[str, Tensor]]


@pytest.fixture(autouse=True)
def _fresh(object_server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "_clients", {})
    object_server.use()


def run_remote(server: ObjectServer, root: Path, body: str, *args: Any) -> None:
    """A rank in a folder that no other rank has, in which it writes nothing."""
    server.use()
    folder = root / f"rank-{dist.get_rank()}-of-{dist.get_world_size()}"
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    globals()[body](*args)
    assert not [*Path().iterdir()], "something was written to the local disk"


def load_states(place: str | Path, result: Path, ranks_before: int) -> None:
    """Load the newest step into another sharding; keep all that the run has then."""
    run = Run(place, "fsdp2", seed=99)  # type: ignore[arg-type]
    loaded = run.manager.load_sharded_checkpoint()
    assert loaded.path == as_path(place) / "step-2"
    rank = dist.get_rank()
    assert loaded.data_status == (status_of(rank, 2) if rank < ranks_before else None)
    states = run.states()
    if rank == 0:
        torch.save(states, result)


@pytest.fixture(scope="module", params=BACKENDS)
def places(
    request: pytest.FixtureRequest, object_server: ObjectServer, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """The same run of two ranks to step 2, in the store and on a disk. Read only."""
    backend, root = request.param, tmp_path_factory.mktemp(f"saved-{request.param}")
    remote, local = object_server.url(f"manager/{backend}"), root / "run"
    options = {"backend": backend}
    run_on_ranks(run_remote, 2, root, object_server, root, "run_steps", remote, "fsdp1", 0, 2, None, options)
    run_on_ranks(run_steps, 2, root, local, "fsdp1", 0, 2, None, options)
    return remote, local


@pytest.mark.parametrize("ranks", [1, 3])
def test_any_number_of_ranks_loads_what_it_loads_from_a_disk(
    object_server: ObjectServer, places: tuple[str, Path], tmp_path: Path, ranks: int
) -> None:
    remote, local = places
    kept = [tmp_path / "remote.pt", tmp_path / "local.pt"]
    run_on_ranks(run_remote, ranks, tmp_path, object_server, tmp_path, "load_states", remote, kept[0], 2)
    run_on_ranks(load_states, ranks, tmp_path, local, kept[1], 2)
    found, wanted = (torch.load(path, weights_only=True) for path in kept)
    assert {part: found[part].keys() for part in found} == {part: wanted[part].keys() for part in wanted}
    assert len(wanted["optimizer"]) > 200
    for part, tensors in wanted.items():
        assert not [name for name, tensor in tensors.items() if not torch.equal(found[part][name], tensor)], part


def test_the_same_files_are_in_the_store_as_on_a_disk(
    object_server: ObjectServer, places: tuple[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    remote, local = places
    attempt = read_metadata(as_path(f"{remote}/step-2")).attempt
    prefix = remote.removeprefix(object_server.url(""))
    names = {path.name for path in (local / "step-2").iterdir()} - {"metadata.json"}
    assert object_server.keys(prefix).keys() == {"step-2/metadata.json", *(f"step-2/{attempt}/{n}" for n in names)}
    here, there = read_metadata(local / "step-2"), read_metadata(as_path(f"{remote}/step-2"))
    random = "rng."  # Python's differ from process to process
    assert {n: t for n, t in there.tensors.items() if not n.startswith(random)} == {
        n: t for n, t in here.tensors.items() if not n.startswith(random)
    }
    assert main(["verify", f"{remote}/step-2"]) == 0
    assert main(["inspect", remote]) == 0
    assert "step-2" in capsys.readouterr().out


class Small:
    """A model of a few numbers with an average, and their manager."""

    def __init__(self, place: str | Path, backend: Backend = "dcp") -> None:
        torch.manual_seed(7)
        self.model = nn.Linear(8, 5)
        self.ema = EMA(self.model, decay=0.5)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        parts: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer, "ema": self.ema}
        self.manager = ShardedCheckpointManager(place, **parts, backend=backend, timeout_secs=30)

    def train(self, begin: int, end: int) -> None:
        for step in range(begin, end):
            self.model(torch.ones(3, 8)).sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.ema.update()
            self.manager.save_sharded_checkpoint(step + 1, data_status={"at": step})

    def weights(self) -> dict[str, Tensor]:
        average = {f"ema.{name}": tensor for name, tensor in self.ema.model_state_dict().items()}
        return {name: tensor.detach().clone() for name, tensor in {**self.model.state_dict(), **average}.items()}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def save_three(server: ObjectServer, place: str, backend: Backend, pid: Path) -> None:
    pid.write_text(str(os.getpid()))
    server.use()
    small = Small(place, backend)
    begin = small.manager.newest_checkpoint() and small.manager.load_sharded_checkpoint().step
    small.train(begin or 0, 3)


def kill_at(proxy: Proxy, point: int, moment: str, pid: Path) -> None:
    """Let the process that ``pid`` names die at its n-th PUT, before the store has it or after."""

    def is_reached(request: Request) -> bool:
        puts = [one for one in proxy.requests if one.method == "PUT"]
        return request in puts and puts.index(request) == point

    def fault(request: Request, seen: int) -> Fault | None:  # noqa: ARG001
        if moment == "before" and is_reached(request):
            os.kill(int(pid.read_text()), signal.SIGKILL)
            return "drop"
        return None

    def done(request: Request) -> None:
        if moment == "after" and is_reached(request):
            os.kill(int(pid.read_text()), signal.SIGKILL)

    proxy.fault, proxy.done = fault, done


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_kill_at_any_write_of_a_save_tears_nothing(
    object_server: ObjectServer, tmp_path: Path, backend: Backend
) -> None:
    straight, pid = Small(tmp_path / "straight", backend), tmp_path / "pid"
    straight.train(0, 3)
    # Before the second step are the two probes and the writes of the first one: owner, files, manifest.
    writes = {"dcp": 5, "per_rank": 4}[backend]
    for i in range(writes):
        moment = "after" if i % 2 else "before"
        name = f"manager/killed-{backend}-{i}"
        place = object_server.url(name)
        with proxied(object_server) as proxy:
            kill_at(proxy, 2 + writes + i, moment, pid)
            with pytest.raises(ProcessExitedException) as died:
                run_on_ranks(save_three, 1, tmp_path, proxy.server, place, backend, pid)
        assert died.value.exit_code == -signal.SIGKILL
        steps = committed_steps(as_path(place))
        assert steps == ([1, 2] if (i, moment) == (writes - 1, "after") else [1])
        assert [damage for step in steps for damage in find_damage(as_path(f"{place}/step-{step}"))] == []
        run_on_ranks(save_three, 1, tmp_path, object_server, place, backend, pid)
        resumed = Small(place, backend)
        assert resumed.manager.load_sharded_checkpoint().step == 3
        assert same(resumed.weights(), straight.weights())
        files = {f"step-{n}/{read_metadata(as_path(f'{place}/step-{n}')).attempt}" for n in (1, 2, 3)}
        left = {key.rpartition("/")[0] for key in object_server.keys(name) if not key.endswith("metadata.json")}
        assert left == files, "what the dead attempt left is swept"


def run_damaged(server: ObjectServer, place: str, backend: Backend) -> None:
    server.use()
    small = Small(place, backend)
    small.train(0, 2)
    second = small.weights()
    small.train(2, 3)
    dist.barrier()
    if dist.get_rank() == 0:
        damage(server, f"{place}/step-3", small.model.weight.detach().numpy().tobytes())
    dist.barrier()
    assert str(small.manager.newest_checkpoint()) == f"{place}/step-2"
    loaded = small.manager.load_sharded_checkpoint()
    assert (loaded.step, loaded.data_status) == (2, {"at": 1})
    assert same(small.weights(), second)
    with pytest.raises((CorruptCheckpointError, RankFailedError)):
        small.manager.load_sharded_checkpoint(f"{place}/step-3")


def damage(server: ObjectServer, step: str, content: bytes) -> None:
    """Flip a bit of the object that has this content."""
    client, prefix = server.client(), step.removeprefix(server.url(""))
    objects = {name: bytearray(obstore.get(client, f"{prefix}/{name}").bytes()) for name in server.keys(prefix)}
    name = next(name for name, data in objects.items() if content in data)
    objects[name][objects[name].index(content)] ^= 1
    obstore.put(client, f"{prefix}/{name}", bytes(objects[name]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_newest_sound_step_is_taken(object_server: ObjectServer, tmp_path: Path, backend: Backend) -> None:
    place = object_server.url(f"manager/damaged-{backend}")
    run_on_ranks(run_damaged, 2, tmp_path, object_server, place, backend)


def test_a_store_that_refuses_is_not_taken_for_damage(object_server: ObjectServer) -> None:
    """Otherwise a network that is down would make the run begin anew, or take an older step."""
    small = Small(object_server.url("manager/away"))
    small.train(0, 1)
    object_store._clients.clear()
    object_server.use(AWS_SECRET_ACCESS_KEY="another-secret")
    for act in (small.manager.newest_checkpoint, small.manager.load_sharded_checkpoint):
        with pytest.raises((StorageError, RankFailedError), match="SignatureDoesNotMatch") as failed:
            act()
        assert "another-secret" not in str(failed.value)


@pytest.mark.parametrize("place", ["run/step-5", "s3://bucket/manager/step-5/more"])
def test_a_folder_of_steps_is_not_within_a_step(
    object_server: ObjectServer, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Small("run").manager.save_sharded_checkpoint(5)
    before = object_server.keys("manager/step-5")
    with pytest.raises(UsageError, match="the directory of one step"):
        Small(place)
    assert object_server.keys("manager/step-5") == before
    assert sorted(path.name for path in Path("run").iterdir()) == ["step-5"]


def test_a_step_is_converted_and_whole_weights_are_loaded(object_server: ObjectServer, tmp_path: Path) -> None:
    torch.manual_seed(1)
    sizes: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = Qwen2Config(vocab_size=32, hidden_size=16, intermediate_size=16, **sizes, tie_word_embeddings=False)
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    place = object_server.url("manager/converted")
    manager = ShardedCheckpointManager(place, model=model)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    wanted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    step = str(manager.save_sharded_checkpoint(7))
    assert step == f"{place}/step-7"
    options = ["--checkpoint", step, "--base-model", str(tmp_path / "base"), "--dtype", "original"]
    for output in (str(tmp_path / "hf"), f"{place}-hf/step-7"):
        assert main(["to-hf", *options, "--output-dir", output]) == 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert same(exported.state_dict(), wanted)
    assert same(load_file(tmp_path / "hf" / "model.safetensors"), wanted)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    loaded = manager.load_hf_checkpoint(f"{place}-hf/step-7")
    assert (loaded.format, loaded.proved) == ("huggingface", len(wanted))
    assert same(model.state_dict(), wanted)
    assert ShardedCheckpointManager.detect_checkpoint_format(step).name == "sharded"


def test_a_run_by_fsspec_loads_what_it_has_saved() -> None:
    import fsspec

    fsspec.filesystem("memory").store.clear()
    for backend in BACKENDS:
        place = f"memory://bucket/a run/{backend}"
        saved = Small(place, backend)  # type: ignore[arg-type]
        saved.train(0, 2)
        loaded = Small(place, backend)  # type: ignore[arg-type]
        assert loaded.manager.load_sharded_checkpoint().step == 2
        assert same(loaded.weights(), saved.weights())
