"""What reading a checkpoint imports. Most of what a command costs is paid before its first line."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.golden_checkpoint import SHARDED

HEAVY = ("torch.distributed.checkpoint", "torch.distributed.tensor", "torch.distributed.fsdp", "transformers", "sympy")
READING = {
    "importing": "import shardsmith.export.write, shardsmith.inspection, shardsmith.formats.by_path",
    "the command line": "import shardsmith.cli, shardsmith.commands.report, shardsmith.export.plan",
    "one of several ranks": "import shardsmith.ground.torchrun.group, shardsmith.export.write, shardsmith.export.plan",
    "inspecting": f"from shardsmith.inspection import inspect_checkpoint; inspect_checkpoint({str(SHARDED)!r})",
}


@pytest.mark.parametrize("case", READING)
def test_reading_does_not_import_what_only_saving_and_loading_need(case: str) -> None:
    program = f"import json, sys; {READING[case]}; print(json.dumps(list(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert set(json.loads(found.stdout)).isdisjoint(HEAVY)
