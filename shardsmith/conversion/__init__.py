"""``to-dcp``: a checkpoint to start from, made of a Hugging Face directory."""
