"""What we say of checkpoints and folders that somebody else wrote."""
