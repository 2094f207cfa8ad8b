"""What is said of a training that ended early, and that the command in it does what it says."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from shardsmith.cli import main
from shardsmith.hooks import HFExport, Hooks, ShardedSave, every, last

TINY = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, eos_token_id=1
)
WORDS = "the training ended early"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    LlamaForCausalLM(TINY).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def train(run: Path, base: Path, batches: int, steps: int) -> LlamaForCausalLM:
    """A loop of a user's own that takes what its iterator has."""
    model = LlamaForCausalLM(TINY)
    save = ShardedSave(run / "checkpoints", model=model, when=every(2))
    data = iter(range(batches))
    with Hooks(save, HFExport(run / "hf", model=model, base_model=base, dtype="original", when=last())) as hooks:
        for step in range(1, steps + 1):
            with torch.no_grad():
                model.lm_head.weight += next(data) + 1
            hooks.step(step)
    return model


def test_a_loop_that_breaks_off_says_what_last_has_not_done_and_the_command_that_does_it(
    tmp_path: Path, base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), pytest.raises(StopIteration):
        train(tmp_path, base, batches=3, steps=5)
    (line,) = [line for line in caplog.messages if WORDS in line]
    assert f"after step 3: what last() asks for was not done (HFExport in {tmp_path / 'hf'})" in line
    command = shlex.split(line.partition("To export the newest checkpoint: shardsmith ")[2])
    assert main([*command, "--dtype", "float32", "--quiet"]) == 0
    # The checkpoint of step 2 lacks what the third batch has added.
    found = load_file(tmp_path / "hf" / "step-2" / "model.safetensors")["lm_head.weight"]
    torch.testing.assert_close(found.mean().item(), 3.0, atol=0.05, rtol=0)


def test_a_loop_that_comes_to_its_end_says_nothing(
    tmp_path: Path, base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        model = train(tmp_path, base, batches=3, steps=3)
    assert WORDS not in caplog.text
    assert torch.equal(
        load_file(tmp_path / "hf" / "step-3" / "model.safetensors")["lm_head.weight"], model.lm_head.weight
    )


@pytest.mark.parametrize("steps", [0, 1])
def test_where_nothing_is_due_at_the_last_step_nothing_is_said(
    tmp_path: Path, steps: int, caplog: pytest.LogCaptureFixture
) -> None:
    hooks = Hooks(ShardedSave(tmp_path, model=torch.nn.Linear(2, 2), when=last() if steps == 0 else every(1)))
    for step in range(1, steps + 1):
        hooks.step(step)
    with caplog.at_level(logging.WARNING):
        hooks.close(broken_off=True)
    assert WORDS not in caplog.text
