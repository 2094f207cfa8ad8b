"""What a training loop attaches."""
