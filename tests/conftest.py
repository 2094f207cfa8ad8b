"""What several test modules share: runs of real ranks, made once."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from tests.diagnosed_models import FAMILIES, Specimen, make_specimen
from tests.ranks import run_on_ranks
from tests.trained_runs import FROM_TRANSFORMERS, Trained, make_base, read_run, run_training

if TYPE_CHECKING:
    from tests.object_server import ObjectServer

settings.register_profile("untimed", deadline=None)  # other work on the machine must not fail a test
settings.load_profile("untimed")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, and so their children, ignore it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with long tests first: processes that share the files then end at about the same time."""
    with_long = {item.path for item in items if item.get_closest_marker("long")}
    items.sort(key=lambda item: item.path not in with_long)


@pytest.fixture(scope="module", autouse=True)
def own_environment() -> Iterator[None]:
    """No file of tests leaves its variables, such as those of a server, to the next one."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


KINDS = (*FROM_TRANSFORMERS, "odd")
RUNS = {1: KINDS, 2: KINDS, 4: ("odd",)}


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Trained]:
    """Kind of model and number of ranks -> its finished run. Read only."""
    root = tmp_path_factory.mktemp("trained")
    runs = {}
    for ranks, kinds in RUNS.items():
        directory = root / f"{ranks}-ranks"
        directory.mkdir()
        if ranks == 1:
            run_training(kinds, directory)
        else:
            run_on_ranks(run_training, ranks, directory, kinds, directory)
        for kind in kinds:
            make_base(kind, directory / f"base-{kind}")
            runs[kind, ranks] = read_run(kind, directory)
    return runs


@pytest.fixture(scope="session")
def odd(trained: dict[tuple[str, int], Trained]) -> Trained:
    """A checkpoint of 2 ranks with everything that is hard: uneven shards, frozen weights, other dtypes. Read only."""
    return trained["odd", 2]


@pytest.fixture(scope="session")
def object_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectServer]:
    """A real S3 server, empty but for what other tests put below names of their own."""
    from tests.object_server import running_server  # its client is for those who want it

    with running_server(tmp_path_factory.mktemp("objects")) as server:
        yield server


@pytest.fixture(scope="session")
def specimens(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Specimen]:
    """Family -> a model of it that was trained for a few seconds. Read only."""
    return {family: make_specimen(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.fixture(scope="session")
def legacy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model like BAGEL's in every layout of other projects, written by real ranks. Read only."""
    from tests.legacy_layouts import WORLD, run_writers

    directory = tmp_path_factory.mktemp("legacy")
    run_on_ranks(run_writers, WORLD, directory, directory)
    return directory


@pytest.fixture
def dynamic_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A place for the code of models that transformers imports, which no other test, and no user, sees."""

    def forget() -> None:
        # The package keeps the folder in which it was found first.
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
            del sys.modules[name]

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    # Where another test has had such code imported, its folder would be found before this one.
    others = [place for place in sys.path if (Path(place) / "transformers_modules").is_dir()]
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in others])
    forget()
    yield
    forget()


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Where an export may go: a place of its own, so that whatever is left behind is seen."""
    (tmp_path / "exports").mkdir()
    return tmp_path / "exports" / "out"
