"""The Trainer of transformers with Shardsmith attached: one line, ``callbacks=[CheckpointHooks(...)]``.

    torchrun --nproc_per_node=2 examples/transformers_trainer.py --directory trainer-run --steps 100

Kill it at any moment and start it again: it goes on from the last folder that is complete. On CPU the ranks are DDP's;
on accelerators, FSDP2's. The model, its tokenizer and the text are those of fsdp2_loop.py.
"""

from __future__ import annotations

import argparse
import signal
from pathlib import Path

import torch
from fsdp2_loop import BATCH, SEQUENCE, prepare
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Olmo2Config, Trainer, TrainingArguments, set_seed

from shardsmith.hooks import every, finish, last, latest
from shardsmith.integrations.transformers import CheckpointHooks, last_checkpoint


class Text(Dataset):
    """Pieces of a tokenized text, one after the other."""

    def __init__(self, tokens: Tensor) -> None:
        self.rows = tokens[: len(tokens) // SEQUENCE * SEQUENCE].view(-1, SEQUENCE)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("trainer-run"), help="where everything is written")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps")
    given = parser.parse_args()
    sharded = {"fsdp": True, "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}
    arguments = TrainingArguments(
        output_dir=str(given.directory / "out"),
        max_steps=given.steps,
        learning_rate=3e-3,
        per_device_train_batch_size=BATCH // 2,
        gradient_accumulation_steps=2,
        save_steps=10,
        save_total_limit=2,
        logging_steps=10,
        use_cpu=not torch.accelerator.is_available(),
        report_to=[],
        **(sharded if torch.accelerator.is_available() else {}),
    )
    with arguments.main_process_first():
        prepare(given.directory)
    tokens = torch.load(given.directory / "tokens.pt", weights_only=True)
    set_seed(0)
    hooks = CheckpointHooks(
        ema_decay=0.98,
        export=every(25) | last(),  # at its own steps, to trainer-run/out-hf
        ema_as="directory",
        keep=latest(2),
        stop_on=signal.SIGTERM,  # saves the step and ends
    )
    trainer = Trainer(
        model=AutoModelForCausalLM.from_config(Olmo2Config.from_pretrained(given.directory / "base")),
        args=arguments,
        train_dataset=Text(tokens["train"]),
        eval_dataset=Text(tokens["test"].flatten()),
        processing_class=AutoTokenizer.from_pretrained(given.directory / "base"),
        callbacks=[hooks],
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(given.directory / "out"))
    losses = {"main": trainer.evaluate()["eval_loss"]}
    with hooks.swapped_in():
        losses["ema"] = trainer.evaluate()["eval_loss"]
    if trainer.is_world_process_zero():
        print(f"evaluation loss: main {losses['main']:.6f}, ema {losses['ema']:.6f}", flush=True)
    finish()  # ends the process groups before the interpreter does, which torch may hang in otherwise


if __name__ == "__main__":
    main()
