"""Jobs of the real TorchTitan on CPU ranks.

All ranks are forked from a server that has imported TorchTitan: a job of a few steps on two ranks takes a second, and
one group of ranks does several jobs one after the other.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.distributed.checkpoint.api import CheckpointException
from transformers import GenerationConfig, LlamaConfig

from tests.ranks import run_on_ranks
from tests.titan.cpu import IS_0_3, train, trainer
from tests.titan.small_models import DENSE, LAYERS, STAGED, STAGED_LAYERS

WORDS = 2000
OVERRIDE = "shardsmith.integrations.torchtitan.checkpoint_hooks"
PRELOADED = [
    "tests.titan.jobs",
    "tests.titan.small_models",
    "tests.titan.backend",
    "transformers.models.llama.modeling_llama",  # each export asks it for its names
    "shardsmith.integrations.torchtitan.manager",
    *(["tests.titan.configs", "shardsmith.integrations.torchtitan.manager_0_3"] if IS_0_3 else []),
]

LLAMA = LlamaConfig(
    vocab_size=2048,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=LAYERS,
    num_attention_heads=16,
    rms_norm_eps=1e-5,
    rope_parameters={
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    max_position_embeddings=131072,
    tie_word_embeddings=False,
    architectures=["LlamaForCausalLM"],
)

BFLOAT16 = ["--training.mixed_precision_param=bfloat16"]
"""TorchTitan's default, for jobs to which it matters: on processors without instructions for it, such products of
matrices take 7 to 20 times as long as those of float32, which was more than half of the time of all jobs."""
_STEPS = ["--training.steps=4", "--training.seq_len=32", "--training.local_batch_size=2", "--metrics.log_freq=1"]
_STEPS += ["--training.mixed_precision_param=float32"]
_MODEL = (
    ["--module=tests.titan.configs", "--dataloader.dataset=c4_test"]
    if IS_0_3
    else ["--model.name=llama3", "--training.dataset=c4_test", "--activation_checkpoint.mode=none"]
)
_LAYERS = {DENSE: LAYERS, STAGED: STAGED_LAYERS}
_CHECKPOINT = ["--checkpoint.enable", "--checkpoint.interval=2", "--checkpoint.no-last-save-model-only"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of ``torchtitan.train``."""

    run: Path
    """Its dump folder. ``log-<rank>.txt`` in it has what it logged, ``error-<rank>.txt`` what it ended with, if so."""
    options: Sequence[str] = ()
    """More of the command line; the last word wins."""
    hooks: Mapping[str, Any] | None = None
    """Options of ours; None: nothing of ours is there at all."""
    within: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    """What the job runs within, on each rank."""
    observe: Callable[[Any, Path], None] | None = None
    """Called on each rank with the trainer and ``run`` when the training has ended, before anything is closed."""


@dataclass(frozen=True)
class Assets:
    """What a user has before a run."""

    root: Path
    flavor: str = DENSE
    """Of the Llama that jobs train which choose no model."""
    hf: Path = field(init=False)
    data: Path = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "hf", self.root / "assets")
        object.__setattr__(self, "data", self.root / "data")

    def make(self) -> Assets:
        """A data set of JSON lines, a tokenizer, and the configs of the model that jobs train."""
        vocabulary = {f"w{i}": i for i in range(WORDS)} | {"<eos>": WORDS}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        self.hf.mkdir(parents=True)
        tokenizer.save(str(self.hf / "tokenizer.json"))
        (self.hf / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
        config = copy.deepcopy(LLAMA)
        config.num_hidden_layers = _LAYERS[self.flavor]
        config.save_pretrained(self.hf)
        GenerationConfig(max_new_tokens=7).save_pretrained(self.hf)
        self.data.mkdir()
        texts = (" ".join(f"w{(i * 31 + j * j * 7) % WORDS}" for j in range(80)) for i in range(64))
        (self.data / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return self

    def options(self, run: Path) -> list[str]:
        """The part of a command line that names all these, and where to write."""
        if IS_0_3:
            data = [f"--dataloader.dataset_path={self.data}", f"--dump_folder={run}"]
            return [f"--config=llama3_{self.flavor}", f"--hf_assets_path={self.hf}", *data]
        return [
            f"--model.flavor={self.flavor}",
            f"--model.hf_assets_path={self.hf}",
            f"--training.dataset_path={self.data}",
            f"--job.dump_folder={run}",
        ]


def run_jobs(assets: Assets, world_size: int, directory: Path, *jobs: Job) -> None:
    """All jobs, one after the other, on the same ranks. A job that fails on all of them does not stop the others."""
    run_on_ranks(_run_jobs, world_size, directory, assets, jobs, preload=PRELOADED)


def error_of(job: Job, rank: int = 0) -> str:
    """What the job ended with on a rank; empty if it went well."""
    path = job.run / f"error-{rank}.txt"
    return path.read_text() if path.exists() else ""


def log_of(job: Job, rank: int = 0) -> str:
    """What the job logged on a rank."""
    return (job.run / f"log-{rank}.txt").read_text()


def _run_jobs(assets: Assets, jobs: Sequence[Job]) -> None:
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size)
    for job in jobs:
        job.run.mkdir(parents=True, exist_ok=True)
        with _logging_to(job.run / f"log-{rank}.txt"), job.within():
            try:
                _run_job(assets, job)
            except (Exception, CheckpointException) as error:
                (job.run / f"error-{rank}.txt").write_text(f"{type(error).__name__}: {error}")


@contextlib.contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    """TorchTitan sets its logger up anew in each job; so does this, after it."""
    handler = logging.FileHandler(path)
    original = train.init_logger

    def initialize() -> None:
        original()
        logging.getLogger().addHandler(handler)

    train.init_logger = initialize
    try:
        yield
    finally:
        train.init_logger = original
        logging.getLogger().removeHandler(handler)
        handler.close()


def _run_job(assets: Assets, job: Job) -> None:
    """A command line, in a process group that outlives it."""
    arguments = [*_MODEL, *_STEPS, *_CHECKPOINT, *assets.options(job.run), *job.options]
    destroy, close = dist.destroy_process_group, trainer.Trainer.close

    def observe_and_close(self: Any) -> None:
        if job.observe is not None and sys.exc_info()[0] is None:
            job.observe(self, job.run)
        close(self)

    trainer.Trainer.close = observe_and_close
    dist.destroy_process_group = lambda: None
    try:
        _train(arguments, job)
    finally:
        dist.destroy_process_group, trainer.Trainer.close = destroy, close


@contextlib.contextmanager
def signalled_in(step: int, which: signal.Signals, rank: int | None = None) -> Iterator[None]:
    """A rank, or each one, sends itself a signal while that step is trained."""
    original = trainer.Trainer.train_step

    @functools.wraps(original)
    def train_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.step == step and rank in (None, dist.get_rank()):
            os.kill(os.getpid(), which)
        return original(self, *args, **kwargs)

    trainer.Trainer.train_step = train_step
    try:
        yield
    finally:
        trainer.Trainer.train_step = original


def _train(arguments: list[str], job: Job) -> None:
    """With ``hooks``, as the README says: an override in 0.3, a table of a TOML file and our entry point in 0.2."""
    if IS_0_3:
        named = f"{OVERRIDE}={json.dumps(job.hooks)}" if job.hooks else OVERRIDE
        sys.argv = ["train", *arguments, *(["--override.imports", named] if job.hooks is not None else [])]
        train.main()
    elif job.hooks is None:
        train.ConfigManager.parse_args.__defaults__ = (arguments,)  # it took the command line when it was imported
        train.main(train.Trainer)
    else:
        table = "".join(f"{name} = {json.dumps(value)}\n" for name, value in job.hooks.items())
        toml = job.run / f"job-{dist.get_rank()}.toml"
        toml.write_text(f"[checkpoint_hooks]\n{table}")
        sys.argv = ["shardsmith.integrations.torchtitan", f"--job.config_file={toml}", *arguments]
        from shardsmith.integrations.torchtitan.__main__ import main  # imports TorchTitan, so after tests.titan.cpu

        main()
