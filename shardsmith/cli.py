"""``shardsmith COMMAND``: the jobs of this package on checkpoints that lie on disk; each is a file of ``commands/``."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn

import tyro

from shardsmith.commands import COMMANDS
from shardsmith.errors import ShardsmithError
from shardsmith.torchrun.process import is_other_rank


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command: 0 done, 1 findings, 2 refused or failed (nothing half-done stays on disk)."""
    try:
        with _fewer_collections():
            return _run_command(arguments)
    except ShardsmithError as error:
        if not is_other_rank():
            print(f"shardsmith: {type(error).__name__}\n{error}", file=sys.stderr)
        return 2
    except OSError as error:  # what nobody foresaw, such as a file that may not be read
        print(f"shardsmith: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("shardsmith: interrupted; nothing half-done stays on disk", file=sys.stderr)
        return 130


def _run_command(arguments: Sequence[str] | None) -> int:
    code: int = tyro.extras.subcommand_cli_from_dict(
        COMMANDS,
        prog="shardsmith",
        description="Convert, inspect and diagnose sharded checkpoints.",
        args=arguments,
        use_underscores=True,
    )
    return code


@contextlib.contextmanager
def _fewer_collections() -> Iterator[None]:
    """Importing torch and transformers makes a million objects that stay; to search them for garbage takes 0.5 s."""
    before = gc.get_threshold()
    gc.set_threshold(100_000, 50, 1000)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def run() -> NoReturn:
    """The console script: ``main``, then the end at once, since taking torch down takes a third of a second."""
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    run()
