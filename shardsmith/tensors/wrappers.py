"""What wrappers put into the names of what they wrap: the one list, for live models and for files."""

WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
"""Segments of torch.compile, activation checkpointing and FSDP1, which no model has of its own."""
WRAPPERS_IN_FILES = WRAPPERS | {"_forward_module", "base_layer"}
"""Those of Fabric and of peft, too: a live model shows itself which module holds it, and what is adapted."""
DDP = "module"
"""Segment of DistributedDataParallel, which some models have of their own."""


def without_segments(name: str) -> str:
    """Return a name without what any wrapper may have put into it. Two tensors may become one so."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS_IN_FILES and part != DDP)
