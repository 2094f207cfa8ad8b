"""``shardsmith clean``: what dead attempts have left in the folder of a run, and its deletion."""

from __future__ import annotations

from pathlib import Path

import tyro


def clean(run: tyro.conf.Positional[Path], delete: bool = False, set_aside: bool = False, json: bool = False) -> int:
    """Show what may be deleted from a run's folder, or delete it.

    Saves and exports that died half-way leave directories such as .step-500.tmp-<id>; a resume sets damaged or later
    steps aside. Checkpoints, exports and files of others are never touched, nor is what a running process still
    writes. Without --delete nothing is changed.

    Example: shardsmith clean run

    Example: shardsmith clean run --delete --set-aside

    Args:
        run: The folder with the steps, or the one above it; or a place in an object store.
        delete: Delete what is shown.
        set_aside: Also what a resume has set aside as damaged or superseded.
        json: Print JSON on one line.
    """
    from json import dumps

    from shardsmith.ground.remote_path import as_path
    from shardsmith.ground.sizes import size_text
    from shardsmith.overview import find_leftovers, remove_leftovers

    run = as_path(run)
    # Before anything is deleted: what is left then is told from what was found.
    everything = list(find_leftovers(run))
    found = [one for one in everything if set_aside or one.kind == "unfinished"]
    others = [one for one in everything if one not in found]
    gone = remove_leftovers(run, found) if delete else []
    # In use: a running process holds a lock on it, or somebody else was faster.
    kept = [one for one in found if one not in gone]
    if json:
        listed = [{"path": one.path, "kind": one.kind, "bytes": one.nbytes, "deleted": one in gone} for one in found]
        print(dumps({"path": str(run), "leftovers": listed}))
        return 0
    for one in found:
        word = "deleted" if one in gone else "in use, kept" if delete else one.kind
        print(f"{word}: {one.path}, {size_text(one.nbytes)}")
    total = size_text(sum(one.nbytes for one in (gone if delete else kept)))
    how = "; --delete does it" if kept else ""
    print(f"deleted {len(gone)}, {total}" if delete else f"{len(kept)} can be deleted, {total}{how}")
    if others:
        aside = size_text(sum(one.nbytes for one in others))
        print(f"set aside as damaged or superseded: {len(others)}, {aside}; --set-aside includes them")
    return 0
