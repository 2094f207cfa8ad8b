"""What is worked out about a live model."""
