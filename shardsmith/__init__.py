"""Shardsmith: the checkpoint layer of a sharded PyTorch training run."""
