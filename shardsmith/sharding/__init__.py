"""Which rank holds which box of a tensor."""
