"""Recording a finished DCP directory that other code wrote: a trainer, an older version, a plain ``dcp.save``.

It gets the ``metadata.json`` that ours have, with a hash per file and a digest per tensor, as the last of its files and
durably. From then on it is verified, kept, and exported like one of ours; and where a trainer writes its directories in
place, under their final names, the file is the mark of a complete one.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from shardsmith.checking.arguments import checked
from shardsmith.checking.types import AsPath
from shardsmith.formats.dcp.source import DcpSource
from shardsmith.formats.describe import Measured, describe
from shardsmith.ground import layout
from shardsmith.ground.commit import place_file, refuse_existing, sweep, sync, withdraw_file, writing
from shardsmith.ground.ranks import Ranks
from shardsmith.manifest.checkpoints import hash_file
from shardsmith.manifest.metadata import FileRecord
from shardsmith.tensors.digest import Digest, digest_box

log = logging.getLogger(__name__)

_SHARD = re.compile(r"__([0-9]{1,9})_[0-9]{1,9}\.distcp")


@checked
def adopt(
    directory: AsPath,
    *,
    step: int,
    ema: dict[str, Any] | None = None,
    tied: dict[str, str] | None = None,
    mesh: dict[str, Any] | None = None,
    world_size: int | None = None,
    names: dict[str, Any] | None = None,
    ranks: Ranks | None = None,
) -> Path:
    """Add ``metadata.json`` to a DCP directory whose writing has ended; return the path of that file.

    Everything is read back from the files, which tells what is there from what was meant to be. With ``ranks``, all of
    them call it, from any thread, and each reads the files that it wrote, most likely, and still has in its cache.
    Communicates through the store, and not at all without.

    Args:
        directory: With ``.metadata`` in it; on a file system that all ranks share.
        step: Optimizer steps done.
        ema: Facts of the average in it, as ``EMA.facts`` gives them.
        tied: Alias -> kept FQN.
        mesh: Shape and dimension names of the parameters' device mesh.
        world_size: Ranks that saved it; default those that are here.
        names: How its weights are called in Hugging Face files, as ``metadata.json`` has it. That of rank 0 counts.
        ranks: Of the job; default this process alone.

    Raises:
        TargetExistsError: it has a ``metadata.json``; see ``disown``.
        CheckpointError: it is no DCP directory, is incomplete, or holds something that is not read.
        WriteError: the file could not be written.
        RankFailedError: one of these, on all ranks, where there are several.
    """
    path = directory / layout.METADATA_FILE
    size = ranks.size if ranks else 1

    def write(parts: list[dict[str, Any]]) -> None:
        # Opened anew on the rank that writes: the index is checked once more against the files as they are now.
        source = DcpSource(directory)
        source.close()
        metadata = describe(
            source.index,
            Measured.merge(parts),
            attempt=layout.new_attempt_id(),
            step=step,
            ema=ema,
            tied=tied or {},
            world_size=world_size or size,
            mesh=mesh,
            names=names,
        )
        # The entries of the data files must be durable before the file that calls the directory complete.
        with writing(directory, "fsync of the directory"):
            sync(directory)
        sweep(directory)  # what a kill has left of an earlier attempt at this
        place_file(path, metadata.to_json())
        log.info("recorded %s", directory)

    def measure(rank: int) -> dict[str, Any]:
        # On each rank before it reads anything, so that the answer does not take minutes.
        refuse_existing(path)
        return _measure(directory, rank, size)

    if ranks is None:
        write([measure(0)])
    else:
        ranks.agree(f"recording {directory.name}", lambda: measure(ranks.rank), write, large=True)
    return path


def disown(directory: Path) -> bool:
    """Take ``metadata.json`` away, durably: something else is about to be written there. False if there was none.

    One rank calls it. Raises WriteError.
    """
    return withdraw_file(directory / layout.METADATA_FILE)


def _measure(directory: Path, part: int, parts: int) -> dict[str, Any]:
    """Hash and digest the files that fall to one rank, and make them durable."""
    source = DcpSource(directory)
    try:
        # A deal that needs no message: each rank computes it from the same index.
        names = [layout.DCP_INDEX_FILE, *sorted(source.index.files)]
        mine = {name for i, name in enumerate(names) if _owner(name, i) % parts == part}
        measured = Measured()
        for name in sorted(mine):
            with writing(directory / name, "fsync"):
                sync(directory / name)
                size = (directory / name).stat().st_size
                measured.files[name] = FileRecord(size=size, xxh3_128=hash_file(directory / name))
        _digest(source, mine, measured)
        return measured.to_plain()
    finally:
        source.close()


def _digest(source: DcpSource, files: set[str], measured: Measured) -> None:
    for key, entry in source.index.tensors.items():
        measured.add(key, Digest())  # also of a tensor without elements
        for stored in entry.chunks:
            # Each file falls to one rank, so each chunk is digested once and the shares add up.
            if stored.file in files:
                for box, values in source.pieces(key, stored.chunk):
                    measured.add(key, digest_box(values, box, entry.spec.shape))


def _owner(name: str, position: int) -> int:
    """The rank that wrote a file, as torch names them; any number for a file of another name."""
    match = _SHARD.fullmatch(name)
    return int(match[1]) if match else position
