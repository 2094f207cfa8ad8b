"""Runs that several tests look at, made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integrations.trainer_runs import Case, run


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Path]:
    """Case -> the directory of a run of it that has ended, to be read only; see ``train``."""
    done: dict[str, Path] = {}

    def make(case: Case) -> Path:
        if repr(case) not in done:
            done[repr(case)] = tmp_path_factory.mktemp(str(case))
            run(case, done[repr(case)])
        return done[repr(case)]

    return make
