"""What an initial load has verified, for people and for tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class InitialLoadReport:
    """Result of an initial load: the model that trains equals the one in the checkpoint. The same on every rank."""

    path: Path
    """The checkpoint."""
    source_format: str
    """As ``shardsmith detect`` names it."""
    tensors: int
    """Parameters and persistent buffers with the digest of the source; of tied ones, each name counts."""
    elements: int
    """Of those; tied ones once."""
    digests: str
    """``recorded`` in metadata.json when the checkpoint was made, or ``read`` from its files now."""
    cast: dict[str, int]
    """``float32 -> bfloat16``: how many tensors were cast so; the digests are of the cast values."""
    tied: dict[str, str]
    """Alias -> kept name, of what is one tensor in the model and in the source."""
    untied: dict[str, str]
    """Of what is one tensor in the source and two, equal ones, in the model: they will train apart."""
    buffers: tuple[str, ...]
    """Non-persistent buffers that equal the reference."""
    buffers_from: str
    """What the reference was made of."""
    repaired: tuple[str, ...]
    """Non-persistent buffers that did not equal the reference, and were overwritten with it."""
    unproved: tuple[str, ...]
    """Non-persistent buffers without a reference, which was allowed."""
    missing: tuple[str, ...]
    """Tensors of the model that the source lacks, which was allowed."""
    extra: tuple[str, ...]
    """Tensors of the source that the model lacks, which was allowed."""
    reshaped: tuple[str, ...] = ()
    """Tensors of another shape in the source, which was allowed: they have the values that they had."""
    loaded: bool
    """Whether this call loaded them, or looked at what somebody else had loaded."""

    @property
    def summary(self) -> str:
        """Summary in one line."""
        parts = [
            f"{self.tensors} tensors ({self.elements:,} elements) equal those of {self.path} (digests {self.digests})",
            "" if self.missing or self.reshaped else "every tensor of get_model_state_dict is among them",
            f"{len(self.buffers) + len(self.repaired)} non-persistent buffers equal {self.buffers_from}"
            if self.buffers or self.repaired
            else "",
            f"{len(self.repaired)} of them were repaired ({', '.join(self.repaired)})" if self.repaired else "",
            f"{len(self.tied)} tied" if self.tied else "",
            f"NO LONGER TIED, equal for now: {_pairs(self.untied)}" if self.untied else "",
            "cast " + ", ".join(f"{text} ({n})" for text, n in self.cast.items()) if self.cast else "",
            _listed("not in the checkpoint, as allowed", self.missing),
            _listed("not in the model, as allowed", self.extra),
            _listed("of another shape in the checkpoint and left as they were, as allowed", self.reshaped),
            _listed("without a reference, as allowed", self.unproved),
        ]
        return "; ".join(part for part in parts if part)


def _pairs(aliases: dict[str, str]) -> str:
    return ", ".join(f"{alias} and {kept}" for alias, kept in aliases.items())


def _listed(what: str, names: tuple[str, ...]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what}: {', '.join(names[:3])}{more}"
