"""Make a Hugging Face directory from a checkpoint of any format: plan, write, commit.

No model is built and no process group needed. Threads go through the output front to back; each reads one block from
the mapped source, casts it into its own buffer and writes that to its final place, so memory stays at some blocks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from shardsmith.block_copy import copy_blocks
from shardsmith.checkpoints import find_damage
from shardsmith.commit import Attempt, require_space, sweep
from shardsmith.companion import find_folder_damage, is_complete
from shardsmith.completion import complete_directory
from shardsmith.digest import Digest
from shardsmith.directory_plan import ModelPlan
from shardsmith.errors import CorruptCheckpointError
from shardsmith.export_plan import ExportPlan
from shardsmith.formats import SHARDED, detect_checkpoint_format
from shardsmith.safetensors_writer import SafetensorsFileWriter
from shardsmith.tensors import TensorSource


def write_directories(plans: Sequence[ExportPlan], progress: Callable[[int], None] | None = None) -> list[Path]:
    """Write planned directories of one checkpoint and make them visible when all of them are on disk; their paths.

    The first one appears last, so whoever sees it can rely on the others. The plans' sources are closed in the end.
    Call it within ``hold(checkpoint)``, and plan there too, if something might remove the checkpoint meanwhile.

    Args:
        progress: Called from several threads with the number of bytes of weights just written.

    Raises:
        CorruptCheckpointError: the checkpoint's bytes are not those that were saved.
        WriteError: writing failed. No output exists, and nothing else was touched.
    """
    for parent in {plan.directory.output.parent for plan in plans}:
        sweep(parent)
    with contextlib.ExitStack() as attempts, ThreadPoolExecutor(1, "shardsmith-verify") as pool:
        for plan in plans:
            attempts.callback(plan.close)
        checkpoints = {plan.checkpoint for plan in plans if plan.verify}
        verified = [pool.submit(verify_source, checkpoint) for checkpoint in checkpoints]
        written = []
        for plan in plans:
            attempt = attempts.enter_context(Attempt(plan.directory.output))
            written.append((attempt, _write_directory(plan, attempt.directory, progress)))
        for verification in verified:
            verification.result()
        return [attempt.commit(sizes) for attempt, sizes in reversed(written)][::-1]


def verify_source(checkpoint: Path) -> None:
    """Raise CorruptCheckpointError if a file of a checkpoint with recorded hashes has changed. Others pass."""
    if detect_checkpoint_format(checkpoint).name == SHARDED:
        refuse_damage(checkpoint, find_damage(checkpoint))
    elif is_complete(checkpoint):
        refuse_damage(checkpoint, find_folder_damage(checkpoint, weights_only=True))


def refuse_damage(checkpoint: Path, damage: Sequence[str]) -> None:
    """Raise CorruptCheckpointError if ``find_damage`` has found any."""
    if damage:
        lines = "\n  ".join(damage)
        advice = "Nothing was written. Copy these files again, or take another step."
        raise CorruptCheckpointError(checkpoint, f"is damaged\n  {lines}\n{advice}")


def _write_directory(plan: ExportPlan, directory: Path, progress: Callable[[int], None] | None) -> dict[str, int]:
    """Write and fsync everything that belongs into a directory; the size of each file."""
    require_space(directory, plan.directory.nbytes)
    digests = {
        model.model: _write_weights(model, plan.sources[model.model], directory, progress)
        for model in plan.directory.models
    }
    return complete_directory(plan.directory, directory, digests)


def _write_weights(
    plan: ModelPlan, source: TensorSource, directory: Path, progress: Callable[[int], None] | None
) -> dict[str, Digest]:
    """Write and fsync the weight files of one model; the digest of each tensor."""
    with contextlib.ExitStack() as files:
        writers = [files.enter_context(SafetensorsFileWriter.create(directory, file)) for file in plan.weights.files]
        digests = copy_blocks(source, writers, progress)
        for writer in writers:
            writer.sync()
    return digests
