"""Models that transformers itself distributes: ``from_pretrained(..., distributed_config=DistributedConfig(...))``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from shardsmith.hooks import EMA, HFExport, Hooks, ShardedSave, at, every
from tests.integrations.trainer_runs import (
    assert_close,
    assert_equal,
    make_data,
    pretend_to_have_an_accelerator,
    record,
    set_environment,
    whole,
)
from tests.integrations.trainer_runs import averaged as average_of
from tests.ranks import run_on_ranks

SIZES = {
    "vocab_size": 104,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LAYOUTS: dict[str, dict[str, Any]] = {
    "fsdp": {"fsdp_size": 2},
    "replicas": {"dp_replicate_size": 2},
    "tp": {"tp_size": 2},
    "experts apart": {"fsdp_size": 2, "ep_size": 2},
    "tp, experts apart": {"tp_size": 2, "ep_size": 2},
}
CASES = [*(("moe", layout) for layout in LAYOUTS), ("tied", "tp")]


def save_base(kind: str, directory: Path) -> Path:
    torch.manual_seed(0)
    if kind == "moe":
        config: Any = transformers.Qwen3MoeConfig(**SIZES, **EXPERTS)
    else:
        config = transformers.Qwen2Config(**SIZES, tie_word_embeddings=True)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def distributed(base: Path, layout: str) -> Any:
    config = transformers.DistributedConfig(**LAYOUTS[layout])
    return transformers.AutoModelForCausalLM.from_pretrained(base, distributed_config=config, dtype=torch.float32)


def run_trainer(base: Path, layout: str) -> None:
    from shardsmith.integrations.transformers import CheckpointHooks

    set_environment()
    if "tp" in layout:  # Trainer wants an accelerator for that
        pretend_to_have_an_accelerator()
    hooks = CheckpointHooks(ema_decay=0.75, export=every(2), dtype="float32", ema_as="directory", base_model=str(base))
    arguments = transformers.TrainingArguments(
        output_dir=str(base.parent / "out"),
        max_steps=4,
        per_device_train_batch_size=2,
        save_steps=2,
        save_only_model=True,
        report_to=[],
        use_cpu="tp" not in layout,
        learning_rate=1e-2,
        disable_tqdm=True,
    )
    data: Any = make_data()
    trainer = transformers.Trainer(
        model=distributed(base, layout), args=arguments, train_dataset=data, callbacks=[hooks]
    )
    recorder = record(trainer, (None, None), (None, None))  # type: ignore[arg-type]
    trainer.train()
    if dist.get_rank() == 0:
        torch.save(recorder.history, base.parent / "history.pt")


def loaded(directory: Path) -> dict[str, Tensor]:
    model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.state_dict()


@pytest.mark.parametrize(("kind", "layout"), CASES, ids=map(", ".join, CASES))
def test_trainer_trains_it_and_the_export_is_what_transformers_saves_itself(
    kind: str, layout: str, tmp_path: Path
) -> None:
    base = save_base(kind, tmp_path / "base")
    run_on_ranks(run_trainer, 2, tmp_path, base, layout)
    history = torch.load(tmp_path / "history.pt")
    for step in (2, 4):
        own = loaded(tmp_path / "out" / f"checkpoint-{step}")
        assert_equal(loaded(tmp_path / "out-hf" / f"step-{step}"), own)
        assert_equal(own, {name: history[step][name] for name in own})
        averaged = loaded(tmp_path / "out-hf" / f"step-{step}-ema")
        expected = average_of(history[: step + 1])
        assert_close(averaged, {name: expected[name] for name in averaged})


def run_saving(base: Path, layout: str, run: Path, until: int) -> None:
    """Train up to a step, saving each second one, from where the run is; keep what must be on disk and in memory."""
    model = distributed(base, layout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ema = EMA(model, decay=0.75)
    save = ShardedSave(run / "checkpoints", model=model, optimizer=optimizer, ema=ema, when=every(2))
    export = HFExport(run / "hf", model=model, ema=ema, base_model=str(base), when=at(4), dtype="float32")
    options = StateDictOptions(full_state_dict=True)
    with Hooks(ema, save, export) as hooks:
        resumed = hooks.resume()
        for step in range(resumed, until + 1):
            if step > resumed:
                tokens = torch.randint(104, (2, 8), generator=torch.Generator().manual_seed(step))
                model(input_ids=tokens, labels=tokens).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                hooks.step(step)
            if step > 0:
                states = whole(model), whole_optimizer(model, optimizer, options)
                if dist.get_rank() == 0:
                    torch.save(states, run / f"{layout}-{step}.pt")


def whole_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, options: StateDictOptions) -> dict[str, Tensor]:
    state: Any = get_optimizer_state_dict(model, optimizer, options=options)["state"]
    return {f"{name}.{part}": value.detach().clone() for name, parts in state.items() for part, value in parts.items()}


PAIRS = [("tp", "replicas"), ("tp, experts apart", "fsdp"), ("experts apart", "tp, experts apart")]


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=map(" -> ".join, PAIRS))
def test_a_run_in_an_own_loop_resumes_under_another_distribution(first: str, second: str, tmp_path: Path) -> None:
    base = save_base("moe", tmp_path / "base")
    run_on_ranks(run_saving, 2, tmp_path, base, first, tmp_path, 4)
    run_on_ranks(run_saving, 2, tmp_path, base, second, tmp_path, 4)
    for then, now in zip(torch.load(tmp_path / f"{first}-4.pt"), torch.load(tmp_path / f"{second}-4.pt"), strict=True):
        assert_equal(now, then)
    exported = loaded(tmp_path / "hf" / "step-4")
    assert_equal(exported, torch.load(tmp_path / f"{first}-4.pt")[0])
