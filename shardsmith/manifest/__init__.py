"""metadata.json: what we record about a checkpoint."""
