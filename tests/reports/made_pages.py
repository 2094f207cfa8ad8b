"""A page of each kind, of a model with faults and of a run with a failure: what browsers are to show."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from shardsmith.cli import main
from shardsmith.hooks import EMA, HFExport, Hooks, ShardedSave, every, json_lines, latest, multiples_of

LAYERS = 12
EVIL = 'model.layers.0.<b onclick="x">&' + "long" * 40 + ".weight"
"""A name that is HTML and wider than a phone."""
SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def make_pages(place: Path, *, hostile: bool = True) -> dict[str, Path]:
    """Write ``diagnose``, ``verify``, ``inspect``, ``statistics`` and ``run`` as pages; their paths by those names.

    Args:
        place: An empty directory.
        hostile: With a name and an error that are made to break pages.
    """
    with contextlib.chdir(place):
        return {name: place / page for name, page in _make_pages(hostile).items()}


def _make_pages(hostile: bool) -> dict[str, Path]:
    torch.manual_seed(0)
    base, trained, run = Path("base"), Path("trained"), Path("run")
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(base)
    _break(shutil.copytree(base, trained), hostile)
    _train(run)
    if hostile:
        _add_failure(run)
    commands = {
        "diagnose": ["--checkpoint", trained, "--base-model", base, "--level", "values"],
        "verify": [trained, base],
        "inspect": [run / "checkpoints" / "step-20"],
        "statistics": [trained, "--statistics"],
        "run": [run],
    }
    pages = {name: Path(f"{name}.html") for name in commands}
    for name, arguments in commands.items():
        command = "inspect" if name == "statistics" else name.replace("run", "inspect")
        assert main([command, *map(str, arguments), "--html", str(pages[name])]) in (0, 1)
    return pages


def _break(model: Path, hostile: bool) -> None:
    """Let a model have what pages must show: values that are far, near and no numbers, and a name from elsewhere."""
    state = load_file(model / "model.safetensors")
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        query, gate = f"{prefix}.self_attn.q_proj.weight", f"{prefix}.mlp.gate_proj.weight"
        state[query] = state[query] * (1 + 10.0 ** (layer - 9))
        state[gate] = state[gate].bfloat16().float() if layer % 2 else state[gate]
    state["model.layers.3.mlp.up_proj.weight"].zero_()
    state["model.layers.4.mlp.down_proj.weight"][0, 0] = torch.nan
    state["model.layers.5.mlp.down_proj.weight"][0, 0] = torch.inf
    more = {EVIL: torch.zeros(2)} if hostile else {}
    save_file({**state, **more}, model / "model.safetensors")


def _train(run: Path) -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32)) for _ in range(4)))
    ema = EMA(model, decay=0.9)
    save = ShardedSave(run / "checkpoints", model=model, ema=ema, when=every(2), keep=latest(4) | multiples_of(10))
    export = HFExport(run / "hf", model=model, ema=ema, when=every(5))
    with Hooks(ema, save, export, on_event=json_lines(run / "events.jsonl")) as hooks:
        for step in range(1, 21):
            with torch.no_grad():
                for weight in model.parameters():
                    weight.add_(torch.randn_like(weight), alpha=0.01)
            hooks.step(step)


def _add_failure(run: Path) -> None:
    """As of a full disk."""
    with (run / "events.jsonl").open("a") as file:
        failed = {"kind": "export", "step": 22, "path": str(run / "hf" / "step-22"), "seconds": 1.5}
        where = (run / "hf" / ".step-22.tmp-0123456789abcdef").resolve()
        error = f"WriteError: {where}: No space left on device: <disk> full"
        file.write(json.dumps({**failed, "seconds_waited": 0.1, "nbytes": 0, "ranks": 1, "error": error}) + "\n")
