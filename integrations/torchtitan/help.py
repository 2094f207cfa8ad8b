"""The options in words, from their one description: the fields of ``CheckpointHooks`` and what stands below each."""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import fields
from typing import get_type_hints

from .options import CheckpointHooks, name_of

_USAGE = """\
Checkpoint hooks of Shardsmith in TorchTitan.

0.3:  torchrun ... -m torchtitan.train ... --override.imports \\
        'shardsmith.integrations.torchtitan.checkpoint_hooks={"ema_decay": 0.999, "export_interval": 1000}'
0.2:  torchrun ... -m shardsmith.integrations.torchtitan --job.config_file=job.toml
      with a table [checkpoint_hooks] in job.toml, or --checkpoint_hooks.ema_decay=0.999 and so on

Options:
"""


def help_text() -> str:
    """How to attach the hooks, and all options with types, defaults and meaning."""
    hints, meanings = get_type_hints(CheckpointHooks), _meanings()
    options = []
    for field in fields(CheckpointHooks):
        meaning = textwrap.fill(meanings[field.name], 100, initial_indent="      ", subsequent_indent="      ")
        options.append(f"  {field.name}: {name_of(hints[field.name])} = {field.default!r}\n{meaning}")
    return _USAGE + "\n".join(options)


def _meanings() -> dict[str, str]:
    """Field -> the text below it, in one line."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(CheckpointHooks))).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for field, text in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            assert isinstance(text, ast.Expr), field.target.id
            assert isinstance(text.value, ast.Constant), field.target.id
            found[field.target.id] = " ".join(str(text.value.value).split())
    return found
