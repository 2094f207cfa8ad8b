"""Every layout that a checkpoint can have: ``by_path`` detects it and opens its weights."""
