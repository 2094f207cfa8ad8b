"""The folders of a trainer's run with our directory in them: which is the one to resume from."""

from __future__ import annotations

import functools
import logging
import re
from pathlib import Path

from shardsmith.checking.arguments import checked
from shardsmith.checking.types import LocalPath
from shardsmith.errors import CheckpointError
from shardsmith.ground.ranks import Ranks
from shardsmith.manifest.checkpoints import why_unreadable
from shardsmith.manifest.companion import find_folder_damage, is_complete, read_folder_record

log = logging.getLogger(__name__)

_NAMED = re.compile(r"(checkpoint|epoch|step)[-_][0-9]+")
"""What Trainer and accelerate call their folders, and the examples of accelerate."""


@checked
def last_checkpoint(parent: LocalPath, *, verify: bool = False) -> str | None:
    """Return the folder of the latest step in ``parent`` that trainer and hooks both completed; None without any.

        trainer.train(resume_from_checkpoint=last_checkpoint("out"))

    ``resume_from_checkpoint=True`` takes the newest folder there is, also one that was half-written when the run was
    killed. All ranks call it; communicates where ``torch.distributed`` is initialised.

    Args:
        parent: The trainer's output directory.
        verify: Also read all files and compare their hashes, divided among the ranks; otherwise only their sizes.
    """
    ranks = Ranks()
    part, parts = ranks.rank, ranks.size

    def find_damage(folder: Path) -> bool:
        found = find_folder_damage(folder, contents=verify, part=part, parts=parts)
        if found:
            log.warning("%s is passed over: %s", folder, "; ".join(found))
        return bool(found)

    # Rank 0 lists, for all: the ranks must look at the same folders in the same order.
    for folder in map(Path, ranks.lead("looking for checkpoints", lambda: _newest_first(Path(parent)))):
        # Each rank looks at its share of the files; damage that one of them finds counts for all.
        if not ranks.agree(f"looking at {folder.name}", functools.partial(find_damage, folder), any):
            return str(folder)
    return None


def _newest_first(parent: Path) -> list[str]:
    found = []
    for folder in sorted(parent.glob("*")):
        try:
            if is_complete(folder):
                found.append((read_folder_record(folder).step, str(folder)))
            elif _NAMED.fullmatch(folder.name) and (reason := why_unreadable(folder)):
                log.warning("%s is passed over: it %s", folder, reason)
        except CheckpointError as error:
            log.warning("%s is passed over: %s", folder, error)
        except OSError as error:
            log.warning("%s is passed over: it cannot be read: %s", folder, error.strerror)
    return [folder for _, folder in sorted(found, reverse=True)]
