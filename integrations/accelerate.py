"""``attach``: what ``accelerator.save_state`` writes gets the average and a manifest, and ``load_state`` is verified.

model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
ema = EMA(model, decay=0.999)
hooks = Hooks(ema, HFExport("run/hf", model=model, ema=ema, when=every(1000) | last()), stop_on=signal.SIGTERM)
attach(accelerator, hooks)

if resuming: accelerator.load_state(folder)
step = hooks.resume()                                # that of the folder; 0 on a fresh start
while step < max_steps and not hooks.should_stop:
    with accelerator.accumulate(model): ...
    if accelerator.sync_gradients: step += 1; hooks.step(step)
    if step % 500 == 0 or hooks.should_stop: accelerator.save_state(f"run/step-{step}")
hooks.close()
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

from torch import nn

from shardsmith.checking.arguments import checked
from shardsmith.checking.types import is_url
from shardsmith.errors import UsageError
from shardsmith.ground.extras import missing_package
from shardsmith.hooks import EMA, FolderSave, Hooks
from shardsmith.manifest.trainer_folders import last_checkpoint

try:
    from accelerate import Accelerator
except ModuleNotFoundError as error:
    raise missing_package(error) from error

__all__ = ["Attached", "attach", "last_checkpoint"]

log = logging.getLogger(__name__)


class Attached:
    """Result of ``attach``. ``remove`` gives the accelerator its own methods back."""

    def __init__(
        self,
        accelerator: Accelerator,
        hooks: Hooks,
        folder_save: FolderSave,
        prove: bool,
        on_missing: Literal["raise", "start"],
    ) -> None:
        self._accelerator = accelerator
        self._hooks = hooks
        self._folder_save = folder_save
        self._verify = prove
        self._on_missing = on_missing
        self._has_ema = any(isinstance(hook, EMA) for hook in hooks.hooks)
        self._folder = Path()  # what accelerate says that it writes or reads
        self._handles = [
            accelerator.register_save_state_pre_hook(self._note),
            accelerator.register_load_state_pre_hook(self._note),
        ]
        # the hooks of accelerate come before it has finished, and there are none for afterwards
        self._save, self._load = accelerator.save_state, accelerator.load_state
        accelerator.save_state = self._save_state
        accelerator.load_state = self._load_state

    def remove(self) -> None:
        """Take all of it off the accelerator. The hooks go on."""
        for handle in self._handles:
            handle.remove()
        # The attributes of the object hide the methods of its class.
        for name in ("save_state", "load_state"):
            vars(self._accelerator).pop(name, None)

    def wait(self) -> None:
        """Wait for what is being added to the last folder; raise what failed in it. All ranks."""
        self._folder_save.wait()

    def _note(self, *told: Any) -> None:
        # The folder is the last argument that accelerate gives to both kinds of hooks.
        self._folder = Path(told[-1])

    def _save_state(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> Any:
        _refuse_remote("save_state", output_dir)
        self._folder_save.wait()  # accelerate may delete older folders first
        if output_dir is not None:
            self._folder_save.before_save(Path(output_dir))
        result = self._save(output_dir, *args, **kwargs)
        # accelerate has written everything by now, whichever name it gave the folder.
        self._folder_save.save(self._hooks.steps_done, self._folder)
        return result

    def _load_state(self, input_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        _refuse_remote("load_state", input_dir)
        self._load(input_dir, *args, **kwargs)
        if self._folder_save.has(self._folder) or (self._has_ema and self._on_missing == "raise"):
            self._folder_save.load(self._folder, prove=self._verify, on_missing=self._on_missing)
        else:
            log.warning("%s has no shardsmith/ directory: an average starts from the present weights", self._folder)


def _refuse_remote(what: str, folder: Any) -> None:
    """Raise UsageError if accelerate would take a URL for the name of a folder, as it does without a word."""
    if folder is not None and is_url(folder):
        raise UsageError(
            f"{what}: {str(folder)!r} is not on a file system, and accelerate would make a local folder of that name. "
            'Give it a path; ShardedSave("s3://...") and HFExport("s3://...") in hooks write to an object store'
        )


@checked
def attach(
    accelerator: Accelerator,
    hooks: Hooks,
    *,
    model: nn.Module | None = None,
    prove: bool = True,
    on_missing: Literal["raise", "start"] = "raise",
    prewarm: bool = False,
) -> Attached:
    """Let ``accelerator.save_state`` and ``load_state`` include the average of ``hooks``, and verify loads.

    All ranks call it, after ``prepare`` and before ``load_state`` and ``hooks.resume``; communicates. Each folder that
    ``save_state`` writes gets a directory ``shardsmith`` as the last thing in it, in the background; ``hooks.step``
    and ``hooks.close`` raise what fails there. FSDP 1 and 2, DDP, one process; the folder must be one that all ranks
    share.

    Args:
        accelerator: The accelerator that prepared the model.
        hooks: With an ``EMA`` of the prepared model, or without.
        model: The prepared model, if several were prepared.
        prove: After ``load_state``, compare every tensor of the model with what was saved.
        on_missing: What to do if a folder that is loaded holds no average: ``"start"`` one from the weights, or
            ``"raise"``.
        prewarm: Allocate the memory that the average is copied to after the first step, as ``ShardedSave`` does,
            instead of at the first ``save_state``.

    Raises:
        UsageError: nothing was prepared, or several models and none was named; or accelerate is to write to a URL.
    """
    _refuse_remote("project_dir", accelerator.project_dir)
    prepared = accelerator._models
    if model is None and len(prepared) != 1:
        raise UsageError(f"{len(prepared)} models were prepared: attach after prepare(), and name one as model=")
    ema = next((hook for hook in hooks.hooks if isinstance(hook, EMA)), None)
    folder_save = FolderSave(prepared[0] if model is None else model, ema=ema, prewarm=prewarm)
    hooks.add(folder_save)
    return Attached(accelerator, hooks, folder_save, prove, on_missing)
