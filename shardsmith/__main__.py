"""``python -m shardsmith COMMAND``: the same as ``shardsmith COMMAND``."""

from shardsmith.cli import run

if __name__ == "__main__":
    run()
