"""A run that could go on training, and the ways to save and to load it, each as a method."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from benchmarks.checkpoint import sharded_llama
from shardsmith.hooks import EMA, ShardedSave, at
from shardsmith.sharding.local_boxes import local_boxes

_NEVER = at(10**9)
_CHUNK_BYTES = 64 << 20


class SavedRun:
    """A float32 model with AdamW and an average. Its methods take a step and return how long the training waits.

    Attributes:
        shard_bytes: What this rank holds, in bytes.
    """

    def __init__(self, folder: Path, parameters: int, small_tensors: int | None = None) -> None:
        self._folder = folder
        self._model = _small_model(small_tensors) if small_tensors else sharded_llama(parameters)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-4)
        for parameter in self._model.parameters():
            # A step with zero gradients makes the moments.
            parameter.grad = torch.zeros_like(parameter)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._ema = EMA(self._model)
        self._hook = self._made_hook("ours", "copy")
        self._step_began = self._step_waited = 0.0
        # Hooks of a step run in the order in which they were
        # registered: these two stand around the save's, which waits.
        self._optimizer.register_step_pre_hook(self._note_begin)
        self._overlapping = self._made_hook("overlap", "overlap")
        self._optimizer.register_step_pre_hook(self._note_wait)
        # Neither pinned nor shared memory, and no asynchronous copy: what works on a CPU.
        self._stager = DefaultStager(StagingOptions(False, False, False, False))
        self._shared_stager = DefaultStager(StagingOptions(False, True, False, False))
        # A group of its own: ``async_save`` runs collectives in a thread beside the training's.
        self._group = dist.new_group(backend="gloo")
        tensors = [value for part in self._state().values() for value in part.values() if isinstance(value, Tensor)]
        shards = [held for tensor in tensors for _, held in local_boxes(tensor)]
        self._shards = sorted(shards, key=lambda shard: -shard.element_size())  # so that each is aligned in one memory
        self.shard_bytes = sum(shard.nbytes for shard in self._shards)
        memory = torch.zeros(self.shard_bytes, dtype=torch.uint8)
        self._bytes, self._buffers = memoryview(memory.numpy()), [*_views(memory, self._shards)]

    def write(self, step: int) -> float:
        """Write as many bytes by ``pwrite``, and ``fsync`` them."""
        began, done = time.perf_counter(), 0
        descriptor = os.open(self._folder / f"limit-{step}-{dist.get_rank()}", os.O_CREAT | os.O_WRONLY)
        while done < len(self._bytes):
            done += os.pwrite(descriptor, self._bytes[done : done + _CHUNK_BYTES], done)
        os.fsync(descriptor)
        os.close(descriptor)
        return time.perf_counter() - began

    def copy(self, step: int) -> float:  # noqa: ARG002
        """Copy what this rank holds into memory that is there."""
        began = time.perf_counter()
        for buffer, shard in zip(self._buffers, self._shards, strict=True):
            buffer.copy_(shard)
        return time.perf_counter() - began

    def save_by_torch(self, step: int) -> float:
        """Save by ``dcp.save``."""
        began = time.perf_counter()
        dcp.save(self._state(), checkpoint_id=self._folder / f"torch-{step}", process_group=self._group)
        return time.perf_counter() - began

    def begin_by_torch(self, step: int) -> Future[Any]:
        """Begin a save by ``dcp.async_save``, in a thread, with memory that is kept."""
        future: Any = dcp.async_save(
            self._state(),
            checkpoint_id=self._folder / f"async-{step}",
            process_group=self._group,
            async_stager=self._stager,
        )
        return future  # type: ignore[no-any-return]

    def begin_by_torch_in_process(self, step: int) -> Future[Any]:
        """Begin a save by ``dcp.async_save``, in a process of its own, with shared memory that is kept."""
        future: Any = dcp.async_save(
            self._state(),
            checkpoint_id=self._folder / f"process-{step}",
            process_group=self._group,
            async_stager=self._shared_stager,
            async_checkpointer_type=AsyncCheckpointerType.PROCESS,
        )
        return future  # type: ignore[no-any-return]

    def begin(self, step: int) -> Future[Any]:
        """Begin a save of ours."""
        self._hook.save(step)
        return self._hook.saving(step)

    def save_by_torch_async(self, step: int) -> float:
        """Save by ``dcp.async_save``."""
        return _waited(self.begin_by_torch, step)

    def save_by_torch_in_process(self, step: int) -> float:
        """Save by ``dcp.async_save`` in a process."""
        return _waited(self.begin_by_torch_in_process, step)

    def save(self, step: int) -> float:
        """Save by ``ShardedSave``."""
        return _waited(self.begin, step)

    def save_overlapped(self, step: int) -> float:
        """Save with a forward, a backward and a step of the optimizer, which waits for what is not copied by then."""
        began = time.perf_counter()
        self._overlapping.save(step)
        stall = time.perf_counter() - began
        # The small model is a list of parameters and computes nothing.
        if hasattr(self._model, "config"):
            self._model(torch.randint(1000, (1, 64))).logits.sum().backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._overlapping.saving(step).result()
        # The call, and what the optimizer's step waited for the rest of the copies.
        return stall + self._step_waited

    def load_by_torch(self, step: int) -> float:
        """Load by ``dcp.load`` what ``dcp.save`` saved."""
        began = time.perf_counter()
        dcp.load(self._state(), checkpoint_id=self._folder / f"torch-{step}", process_group=self._group)
        return time.perf_counter() - began

    def resume(self, step: int) -> float:
        """Resume from what ``save`` saved."""
        began = time.perf_counter()
        assert self._hook.resume() == step
        return time.perf_counter() - began

    def remove_files(self) -> None:
        """Remove all that was saved. All ranks; communicates."""
        dist.barrier()
        kept = [self._folder / name for name in ("ours", "overlap")]
        if dist.get_rank() == 0:
            for path in [*self._folder.iterdir(), *(inner for hook in kept for inner in hook.iterdir())]:
                if path.is_file():
                    path.unlink()
                elif path not in kept:
                    shutil.rmtree(path)
        dist.barrier()

    def close(self) -> None:
        """Close the hooks, and end the process of ``dcp.async_save``, which torch keeps for the next save."""
        self._hook.close()
        self._overlapping.close()
        for child in multiprocessing.active_children():
            child.terminate()
            child.join()

    def _made_hook(self, name: str, staging: Any) -> ShardedSave:
        return ShardedSave(
            self._folder / name,
            model=self._model,
            optimizer=self._optimizer,
            ema=self._ema,
            when=_NEVER,
            staging=staging,
        )

    def _note_begin(self, *_: Any) -> None:
        self._step_began = time.perf_counter()

    def _note_wait(self, *_: Any) -> None:
        self._step_waited = time.perf_counter() - self._step_began

    def _state(self) -> dict[str, Any]:
        options = StateDictOptions(flatten_optimizer_state_dict=True)  # as a checkpoint of ours has it
        return {
            "model": get_model_state_dict(self._model),
            "optimizer": get_optimizer_state_dict(self._model, self._optimizer, options=options),
            "ema_model": self._ema.model_state_dict(),
        }


def _waited(begin: Callable[[int], Future[Any]], step: int) -> float:
    began = time.perf_counter()
    future = begin(step)
    stall = time.perf_counter() - began
    future.result()
    return stall


def _views(memory: Tensor, shards: list[Tensor]) -> Iterator[Tensor]:
    """Parts of one memory with the dtypes and shapes of the shards."""
    # Largest elements first, so each view begins at a multiple of its element's size.
    at = 0
    for shard in shards:
        yield memory[at : at + shard.nbytes].view(shard.dtype).view(shard.shape)
        at += shard.nbytes


def _small_model(tensors: int) -> nn.Module:
    model = nn.ParameterList(nn.Parameter(torch.randn(1000)) for _ in range(tensors))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model
