"""Python programs in processes that are forked from the server of the ranks, which has imported all that they need.

``python -m shardsmith ...`` takes seconds of a processor to import torch and transformers before it does anything; here
it takes what it does itself. What only a new interpreter shows, such as an import that is missing, is for the tests
that start one: each command and each example has one.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import ensure_running
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp

from shardsmith.sharding import staged_copy
from tests.ports import free_ports
from tests.ranks import PRELOADED, SMALL_BYTES


def server() -> ForkServerContext:
    """Return what starts processes of ``multiprocessing`` from the server, which runs from now on.

    It imports what it is told when it starts, and there is one: who is first decides for all tests of this process.
    """
    multiprocessing.set_forkserver_preload([*PRELOADED, "tests.frozen"])
    ensure_running()
    return multiprocessing.get_context("forkserver")


def run_forked(body: Callable[..., None], processes: int, *args: Any) -> None:
    """Call ``body(number, *args)`` in so many processes; one that fails fails the test."""
    server()
    mp.start_processes(body, args, processes, start_method="forkserver")


def start_python(
    *arguments: str | Path,
    cwd: str | Path = ".",
    env: Mapping[str, str] | None = None,
    output: str | Path | None = None,
    errors: str | Path | None = None,
    before: Callable[[], None] | None = None,
) -> BaseProcess:
    """Start what ``python ARGUMENTS`` would run: ``-m module``, ``-c program`` or a script, and its own arguments.

    Args:
        arguments: As on the command line.
        cwd: Where it runs.
        env: Its variables; default those of this process. Modules that are imported already have read theirs.
        output: The file for its standard output; default that of this process.
        errors: The same for its standard error.
        before: Is called in the process first, which has one thread then.
    """
    given = (list(map(str, arguments)), os.path.abspath(cwd), dict(os.environ if env is None else env))
    process = server().Process(target=_main, args=(*given, output, errors, before))
    process.start()
    return process


def run_python(
    *arguments: str | Path,
    cwd: str | Path = ".",
    env: Mapping[str, str] | None = None,
    before: Callable[[], None] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run it to its end. Arguments as of ``start_python``; returns what ``subprocess.run`` does."""
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder, "out"), Path(folder, "err")
        process = start_python(*arguments, cwd=cwd, env=env, output=output, errors=errors, before=before)
        process.join()
        assert process.exitcode is not None
        return subprocess.CompletedProcess(arguments, process.exitcode, output.read_text(), errors.read_text())


def run_torchrun(
    ranks: int, *arguments: str | Path, cwd: str | Path = ".", env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run what ``torchrun --nproc_per_node=RANKS ARGUMENTS`` would. A rank that fails ends none of the others."""
    (port,) = free_ports(1)
    job = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    job |= {"TORCHELASTIC_RUN_ID": "forked", "OMP_NUM_THREADS": 1}
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder, "out"), Path(folder, "err")
        started = []
        for rank in range(ranks):
            own = {**(os.environ if env is None else env), "RANK": rank, "LOCAL_RANK": rank, **job}
            variables = {name: str(value) for name, value in own.items()}
            started.append(start_python(*arguments, cwd=cwd, env=variables, output=output, errors=errors))
        for process in started:
            process.join()
        code = next((process.exitcode for process in started if process.exitcode), 0)
        return subprocess.CompletedProcess(arguments, code, output.read_text(), errors.read_text())


def _main(
    arguments: list[str],
    folder: str,
    environment: dict[str, str],
    output: str | Path | None,
    errors: str | Path | None,
    before: Callable[[], None] | None,
) -> None:
    for number, path in ((1, output), (2, errors)):
        if path is not None:
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    staged_copy.SMALL_BYTES = SMALL_BYTES  # as users have it
    if before is not None:
        before()
    try:
        _run(arguments)
    finally:  # what an interpreter does at its end; a process of a fork server leaves it out
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()


def _run(arguments: Sequence[str]) -> None:
    match arguments:
        case ["-m", module, *rest]:
            sys.argv, sys.path[:0] = [module, *rest], [os.getcwd()]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case ["-c", program, *rest]:
            sys.argv, sys.path[:0] = ["-c", *rest], [""]
            sys.modules["__main__"] = main = types.ModuleType("__main__")
            exec(compile(program, "<string>", "exec"), vars(main))
        case [script, *rest]:
            sys.argv, sys.path[:0] = [script, *rest], [os.path.dirname(script)]
            runpy.run_path(script, run_name="__main__")
