"""Writes docs/diagnose_examples.md, what ``diagnose`` prints of faults: ``python -m tests.planted_examples``."""

from __future__ import annotations

import contextlib
import io
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from shardsmith.diagnose import Questions, diagnose
from shardsmith.diagnose.text import print_diagnosis
from tests.dcp_directories import save_sharded
from tests.diagnose.test_diagnose_planted import CONFIGS
from tests.diagnosed_models import Specimen, config_of, make_specimen
from tests.planted_faults import PLANTED

PAGE = Path(__file__).parent.parent / "docs" / "diagnose_examples.md"
FAMILIES = ("olmo2", "llama-tied")
HEAD = """# What diagnose prints

Made by `python -m tests.planted_examples`: for each kind of fault, planted into a tiny trained OLMo-2 (a Llama with
tied embeddings where OLMo-2 has nothing of the kind), what this command prints:

```bash
shardsmith diagnose --checkpoint CHECKPOINT --base-model BASE --level values
```

Tables of counts are left out.

[Troubleshooting](troubleshooting.md) explains each code.
"""


def examples(specimen: Specimen) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Code, cause, command line beside the paths, and what it asks."""
    for planted in PLANTED:
        if specimen.family in planted.families and not Path(f"checkpoint-{planted.code}").exists():
            place = Path(f"checkpoint-{planted.code}")
            save_sharded(planted.plant(specimen.state), place, 2)
            yield planted.code, planted.cause, "--level values", {"checkpoint": place}
    name = "model.layers.0.mlp.up_proj.weight"
    lacking = {key: tensor for key, tensor in specimen.state.items() if key != name}
    states: dict[str, tuple[str, dict[str, Tensor]]] = {
        "missing-tensors": ("a tensor left out", lacking),
        "extra-tensors": ("a tensor too many", specimen.state | {"model.layers.0.mlp.extra.weight": torch.ones(3)}),
        "shape-differs": ("a tensor of another shape", lacking | {name: torch.zeros(90, 64)}),
    }
    for code, (cause, state) in states.items():
        save_sharded(state, Path(f"checkpoint-{code}"), 2)
        yield code, cause, "--level values", {"checkpoint": Path(f"checkpoint-{code}")}
    save_sharded(specimen.state, Path("good"), 2)
    for code, changes in CONFIGS.items():
        config_of(specimen.family, **changes).save_pretrained(f"trainer-{code}")
        cause = f"the trainer's config has another {', '.join(changes)}"
        yield code, cause, f"--config trainer-{code}", {"checkpoint": Path("good"), "config": Path(f"trainer-{code}")}
    for code, value in (("buffer-zero", 0.0), ("buffer-not-finite", torch.nan)):
        kept = {key: torch.full_like(one, value) for key, one in specimen.buffers.items() if "original" not in key}
        save_file(kept, f"{code}.safetensors")
        place = Path(f"{code}.safetensors")
        yield (
            code,
            f"buffers of the live model are {value}",
            f"--buffers {place}",
            {
                "checkpoint": Path("good"),
                "buffers": place,
            },
        )


def printed(base: Path, asked: dict[str, Any]) -> str:
    """What the command prints."""
    options = {name: value for name, value in asked.items() if name != "checkpoint"}
    found = diagnose(asked["checkpoint"], base, Questions(level="all" if options else "values", **options))
    text = io.StringIO()
    print_diagnosis(found, Console(file=text, width=110, markup=False, emoji=False, highlight=False))
    lines = [line.rstrip() for line in text.getvalue().splitlines() if not line.startswith("main  ")]  # the counts
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def main() -> None:
    """Write the page."""
    parts, seen = [HEAD], set()
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            Path(family).mkdir()
            specimen = make_specimen(family, Path(family))
            for code, cause, options, asked in examples(specimen):
                if code not in seen:
                    seen.add(code)
                    parts.append(f"## `{code}`: {cause}\n\n`{options}`\n\n```\n{printed(specimen.base, asked)}\n```\n")
    PAGE.write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
