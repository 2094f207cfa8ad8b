"""All state of a run: collected, saved, loaded and verified."""
