"""The load that a run starts from, and its proof."""
