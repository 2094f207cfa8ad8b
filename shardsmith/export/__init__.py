"""Complete Hugging Face directories, from checkpoints (``to-hf``) and from live weights."""
