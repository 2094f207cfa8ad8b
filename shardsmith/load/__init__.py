"""Fill a model from a checkpoint, and verify it."""
