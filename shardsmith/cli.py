"""``shardsmith COMMAND``: the jobs of this package on checkpoints on disk; each is a file of ``commands/``."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, Union

import tyro

import shardsmith
from shardsmith.commands import COMMANDS
from shardsmith.commands.options import with_present_names
from shardsmith.errors import CorruptCheckpointError, IncompleteCheckpointError, ShardsmithError
from shardsmith.ground.extras import install_hint
from shardsmith.ground.maps import reading_by_maps
from shardsmith.ground.torchrun.process import is_other_rank

_CONFIG = (tyro.conf.DisallowNone,)  # an option that was not given has no spelling
_BROKEN_PIPE = 128 + 13
"""Exit code of a program that SIGPIPE ended, as a shell reports it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: The command and its options; those of the process by default.

    Returns:
        0 done, 1 findings, 2 refused or failed (nothing half-done stays on disk), 130 interrupted.
    """
    try:
        # A read of a mapped file that has gone ends the process (SIGBUS) without a ``finally``; this cleans up before.
        with _fewer_collections(), reading_by_maps(_abandon_attempts):
            return _run_command(list(sys.argv[1:] if arguments is None else arguments))
    except ShardsmithError as error:
        # Under torchrun all ranks raise the same; one of them says it.
        if not is_other_rank():
            print(f"shardsmith: {type(error).__name__}\n{error}{_advice(error)}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if (hint := install_hint(error)) is None:
            raise
        print(f"shardsmith: {hint}", file=sys.stderr)
        return 2
    # For ``run``: there is nobody left who would read a message.
    except BrokenPipeError:
        raise
    except OSError as error:  # unforeseen, such as a file that may not be read
        from shardsmith.ground.path_advice import not_readable

        described = error if error.filename is None else not_readable(Path(error.filename), error)
        print(f"shardsmith: {type(described).__name__}\n{described}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("shardsmith: interrupted; nothing half-done stays on disk", file=sys.stderr)
        return 130


_READS_STORES = ("clean", "detect", "diagnose", "inspect", "push", "to-hf", "verify", "watch")
"""Commands that read checkpoints in object stores, too."""
_IN_STORES = ("--base-model", "--html", "--output-dir")
"""Options of commands whose value may be a place in a store."""
_BEFORE_A_CHECKPOINT = ("--checkpoint", "--digests", "--json", "--rounding", "--statistics", "--verify")
"""Options of which a checkpoint is the value, or that take no value, so that one may follow."""


_DAMAGED = (
    "\nNothing was written. Copy the files again, or take another step: `shardsmith inspect RUN` lists the steps."
)


def _advice(error: ShardsmithError) -> str:
    """What to do about damaged files, if the error does not say it: for a command nothing else can be done."""
    is_damage = isinstance(error, IncompleteCheckpointError | CorruptCheckpointError)
    return _DAMAGED if is_damage and "\nNothing was" not in str(error) else ""


def _abandon_attempts() -> None:
    # Not imported here: that takes time, and a command that wrote nothing has nothing to abandon.
    if commit := sys.modules.get("shardsmith.ground.commit"):  # else nothing was written
        commit.abandon_all()


def _run_command(arguments: list[str]) -> int:
    if arguments[:1] == ["--version"]:
        print(f"shardsmith {shardsmith.__version__}")
        return 0
    name, options = (arguments or [""])[0], arguments[1:]
    code: int
    if name in COMMANDS:
        options = with_present_names(name, options)
        _refuse_urls(name, options)
        code = tyro.cli(COMMANDS[name], prog=f"shardsmith {name}", args=options, use_underscores=False, config=_CONFIG)
    # Only here are all commands described to tyro, which takes longer than one.
    else:  # help, completion of a shell, or a mistake
        code = tyro.cli(
            _all_commands(),
            prog="shardsmith",
            description="Convert, inspect and diagnose sharded checkpoints. --version prints the version.",
            args=arguments,
            use_underscores=False,
            config=_CONFIG,
        )
    return code


def _refuse_urls(command: str, options: Sequence[str]) -> None:
    """Raise UsageError if a path is where the command cannot reach it, such as ``hdfs://bucket/run``. By its name."""
    # The common case: then the types below need not be imported.
    if not any("://" in option for option in options):
        return
    from shardsmith.checking.arguments import check_value
    from shardsmith.checking.types import AnyPath, LocalPath

    # With the word before each: it says of which option a value is.
    for before, option in zip(["", *options], options, strict=False):
        name, _, value = option.partition("=") if option.startswith("-") else (before, "", option)
        if re.match(r"(?:[A-Za-z0-9+.-]+::)*[A-Za-z][A-Za-z0-9+.-]*://", value):
            is_read = command in _READS_STORES and (name in _BEFORE_A_CHECKPOINT or not name.startswith("-"))
            hint = AnyPath if is_read or name in _IN_STORES else LocalPath
            check_value("shardsmith", name if name.startswith("-") else "path", value, hint)


def _all_commands() -> Any:
    """One type for all commands, each described by the first line of its docstring."""
    lines = {name: (run.__doc__ or "").splitlines()[0] for name, run in COMMANDS.items()}
    # tyro makes subcommands of a Union; one of a tuple cannot be written with bars.
    return Union[  # noqa: UP007
        tuple(
            Annotated[Any, tyro.conf.subcommand(name=name, constructor=run, description=lines[name])]
            for name, run in COMMANDS.items()
        )
    ]


@contextlib.contextmanager
def _fewer_collections() -> Iterator[None]:
    """Importing torch and transformers makes a million objects that stay; to search them for garbage takes 0.5 s."""
    before = gc.get_threshold()
    # Objects until a search of the young ones, and searches of each generation until one of the next.
    gc.set_threshold(100_000, 50, 1000)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def run() -> NoReturn:
    """Run a command and end the process at once: taking torch down takes a third of a second."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # never fail for a terminal's encoding
    try:
        try:
            code = main()
        except SystemExit as end:  # of tyro: help, or options that do not fit
            code = end.code if isinstance(end.code, int) else 2
        # Before the end below: ``os._exit`` flushes nothing, and a closed pipe shows here.
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough, as in "shardsmith --help | head"
        code = _BROKEN_PIPE
    sys.stderr.flush()
    # Nothing is left to do: files are closed or abandoned, and no thread of ours is waited for.
    os._exit(code)


if __name__ == "__main__":
    run()
