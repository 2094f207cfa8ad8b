"""Real runs of the Trainer of transformers with CheckpointHooks attached, on real ranks, and what they must give."""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from shardsmith.hooks import every, last
from tests.ranks import run_on_ranks
from tests.trained_runs import SIZES

DECAY = 0.75
STEPS = 6
RESUMED = 4


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run of ``STEPS`` steps that saves at every second one."""

    kind: str = "llama"
    sharding: str = "fsdp2"
    """``none``, ``ddp``, or FSDP with the type of its state dicts, such as ``fsdp2`` or ``fsdp1-full``."""
    ranks: int = 2
    accumulation: int = 1
    arguments: dict[str, Any] = field(default_factory=dict)
    """Of TrainingArguments."""
    hooks: dict[str, Any] = field(default_factory=dict)
    """Of CheckpointHooks."""

    def __str__(self) -> str:
        return f"{self.kind}-{self.sharding}-{self.accumulation}"


CASES = [
    Case(sharding="fsdp2", accumulation=4),
    Case(sharding="fsdp2-full", kind="qwen2", arguments={"bf16": True}),
    Case(sharding="fsdp2", kind="moe"),
    Case(sharding="fsdp1", kind="qwen2"),
    Case(sharding="ddp", accumulation=4),
    Case(sharding="ddp", kind="moe"),
    Case(sharding="none", ranks=1, kind="qwen2", accumulation=4),
    Case(sharding="none", ranks=1, kind="moe"),
]


def run(case: Case, directory: Path, **options: Any) -> None:
    """Run a case on its ranks; see ``train``."""
    directory.mkdir(parents=True, exist_ok=True)
    run_on_ranks(train, case.ranks, directory, case, directory, options, timeout_secs=120)


def train(case: Case, directory: Path, options: dict[str, Any]) -> None:
    """On each rank.

    Args:
        case: The run to make.
        directory: Where Trainer writes.
        options: ``detach``, to train without our hooks; ``resume``, a folder; ``kill_after``, a step, by
            ``kill_with``, a signal; ``name`` of the file for the truth; ``hold_exports_until``, a step that is saved
            before any export ends; ``finish``, called at the end with Trainer, CheckpointHooks and directory.
    """
    gate = Gate()
    if held := options.get("hold_exports_until"):
        case = replace(case, hooks={**case.hooks, "processor": gate})
    trainer, hooks = make_trainer(case, directory)
    if options.get("detach"):
        trainer.remove_callback(hooks)
    kill = (options.get("kill_after"), options.get("kill_with", signal.SIGKILL))
    recorder = record(trainer, kill, (held, gate))
    trainer.train(resume_from_checkpoint=options.get("resume"))
    if finish := options.get("finish"):
        finish(trainer, hooks, directory)
    truth = {"main": whole(trainer.model), "history": recorder.history}
    if hooks.ema:
        with hooks.swapped_in():
            truth["ema"] = whole(trainer.model)
    if trainer.is_world_process_zero():
        torch.save(truth, directory / options.get("name", "truth.pt"))


def make_trainer(case: Case, directory: Path, **more: Any) -> tuple[Any, Any]:
    prepare_environment(case)
    import transformers

    from shardsmith.integrations.transformers import CheckpointHooks

    transformers.logging.set_verbosity_error()
    chosen = {"ema_decay": DECAY, "export": every(3) | last(), "dtype": "float32", "prewarm": True} | case.hooks
    hooks = CheckpointHooks(**{name: value for name, value in chosen.items() if value is not None})
    arguments: dict[str, Any] = {
        "output_dir": str(directory / "out"),
        "max_steps": STEPS,
        "save_steps": 2,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": case.accumulation,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "logging_strategy": "no",
        **fsdp_arguments(case),
        **case.arguments,
    }
    trainer = transformers.Trainer(
        model=make_model(case.kind),
        args=transformers.TrainingArguments(**arguments),
        train_dataset=make_data(),
        eval_dataset=make_data()[:4],
        callbacks=[hooks],
        **more,
    )
    return trainer, hooks


def prepare_environment(case: Case) -> None:
    """What torchrun sets; and for FSDP, which accelerate offers on accelerators only, a CPU that passes for one."""
    if case.sharding != "none":
        set_environment()
    if case.sharding.startswith("fsdp"):
        pretend_to_have_an_accelerator()


def set_environment() -> None:
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ["OMP_NUM_THREADS"] = "1"


def pretend_to_have_an_accelerator() -> None:
    from accelerate.state import DistributedType, PartialState

    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_XPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))


def fsdp_arguments(case: Case) -> dict[str, Any]:
    if not case.sharding.startswith("fsdp"):
        return {}
    version = int(case.sharding[4])
    config = {
        "version": version,
        "state_dict_type": "FULL_STATE_DICT" if case.sharding.endswith("full") else "SHARDED_STATE_DICT",
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    }
    if version == 1:
        config |= {"sync_module_states": False, "cpu_ram_efficient_loading": False, "use_orig_params": True}
    return {"fsdp": True if version == 2 else "full_shard auto_wrap", "fsdp_config": config}


def make_model(kind: str) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    sizes: dict[str, Any] = {**SIZES, "tie_word_embeddings": kind == "qwen2"}
    if kind == "moe":
        sizes |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 18}
    if kind == "lora":
        return with_adapter(make_model("llama"))
    name = {"llama": "LlamaConfig", "qwen2": "Qwen2Config", "moe": "Qwen3MoeConfig"}[kind]
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**sizes))


def with_adapter(model: nn.Module) -> nn.Module:
    """LoRA on some layers; the norm is trained as a whole."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model.name_or_path = "base-of-the-test"
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["norm"], init_lora_weights=False)
    return get_peft_model(model, config)


def make_data() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(103, (64, 12), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


class Gate:
    """A processor whose saving does not end before it is let through."""

    def __init__(self) -> None:
        self.open = threading.Event()

    def save_pretrained(self, directory: str | Path) -> None:
        assert self.open.wait(60)
        (Path(directory) / "processor.txt").touch()


def record(trainer: Any, kill: tuple[int | None, signal.Signals], held: tuple[int | None, Gate]) -> Any:
    from transformers import TrainerCallback

    class Recorder(TrainerCallback):
        """Keeps the whole weights at the start and after each optimizer step; dies when it is told to."""

        def __init__(self) -> None:
            self.history: list[dict[str, Tensor]] = []

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            self.history.append(whole(model))

        def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            self.history.append(whole(model))

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == kill[0]:
                os.kill(os.getpid(), kill[1])

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == held[0]:
                held[1].open.set()

    recorder = Recorder()
    trainer.add_callback(recorder)
    return recorder


def whole(model: nn.Module) -> dict[str, Tensor]:
    """All ranks get all of it, on the CPU."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return {name: value.detach().clone() for name, value in state.items()}


def averaged(history: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The formula, in double precision."""
    average = {name: value.double() for name, value in history[0].items()}
    for weights in history[1:]:
        for name, value in weights.items():
            average[name] = DECAY * average[name] + (1 - DECAY) * value.double()
    return average


def flip(file: Path) -> None:
    """Change one bit in the middle of a file."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value.double(), expected[name].double(), rtol=1e-5, atol=1e-6)
