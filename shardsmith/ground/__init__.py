"""Process and disk: names of files, commits, ranks, threads, memory. Imports nothing of ours but errors."""
