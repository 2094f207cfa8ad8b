"""``shardsmith COMMAND``: the jobs of this package on checkpoints that lie on disk; each is a file of ``commands/``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import tyro

from shardsmith.commands import COMMANDS
from shardsmith.errors import ShardsmithError
from shardsmith.torchrun.process import is_other_rank


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command: 0 done, 1 findings, 2 refused or failed (nothing half-done stays on disk)."""
    try:
        code: int = tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="shardsmith",
            description="Convert, inspect and diagnose sharded checkpoints.",
            args=arguments,
            use_underscores=True,
        )
        return code
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


def run() -> NoReturn:
    """The console script: ``main``, then the end at once, since taking torch down takes a third of a second."""
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    run()
