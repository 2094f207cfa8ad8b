"""Every layout that a checkpoint can have: ``by_path`` recognises it and opens its weights."""
