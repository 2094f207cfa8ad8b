"""Directories of torch.distributed.checkpoint: read without trusting them, and written."""
