"""Pages that stand on their own: what the commands show on the terminal, with maps, charts and searchable tables."""
