"""The commands of ``shardsmith``, a file each. What one needs is imported when it runs, so that help is instant."""

from __future__ import annotations

from collections.abc import Callable

from shardsmith.commands.clean import clean
from shardsmith.commands.detect import detect
from shardsmith.commands.diagnose import diagnose
from shardsmith.commands.inspect import inspect
from shardsmith.commands.push import push
from shardsmith.commands.to_dcp import to_dcp
from shardsmith.commands.to_hf import to_hf
from shardsmith.commands.verify import verify
from shardsmith.commands.watch import watch

COMMANDS: dict[str, Callable[..., int]] = {
    "to-dcp": to_dcp,
    "to-hf": to_hf,
    "watch": watch,
    "inspect": inspect,
    "detect": detect,
    "diagnose": diagnose,
    "verify": verify,
    "clean": clean,
    "push": push,
}
