"""What a diagnosis is asked, and what it may look at beside the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shardsmith.compare.findings import Level
from shardsmith.formats.opened import Layout
from shardsmith.hf.layout_rules import DECLARED, LayoutRule


@dataclass(frozen=True, kw_only=True, slots=True)
class Questions:
    """Options of ``diagnose_checkpoint``."""

    level: Level | Literal["all"] = "all"
    names: str = "auto"
    """How the checkpoint's names become the model's, as ``aligned_source`` says."""
    rules: Sequence[LayoutRule] = DECLARED
    """What may be done to tensors that the model has in another shape."""
    layout: Layout | None = None
    """The one that the trainer reads."""
    trained: bool | None = None
    """Whether training has moved the weights; None: as the checkpoint says."""
    config: Path | None = None
    """The config.json that the trainer builds its model from, or the directory it is in."""
    tokenizer: Path | None = None
    """The directory of the tokenizer that the trainer uses."""
    training_config: Path | None = None
    """The trainer's own settings: TOML or JSON."""
    training_flags: Sequence[str] = ()
    """What its command line adds to them: ``section.name=value``."""
    batch: Path | None = None
    """The trainer's first batch: safetensors or JSON with ``input_ids``."""
    reference_loss: float | None = None
    """The loss that the trainer reported at its start."""
    buffers: Path | None = None
    """Safetensors with the buffers of the trainer's live model, by name."""
    trust_remote_code: bool = False
    """Run the model's own Python files. Those of the checkpoint never run."""
