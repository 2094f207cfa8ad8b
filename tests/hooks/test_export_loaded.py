"""``verify="load"``: an export appears only if it loads and answers as the live model does."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from shardsmith.errors import CorruptCheckpointError, MismatchError, UsageError
from shardsmith.hooks import EMA, HFExport, at
from shardsmith.hooks.answers import Answers, _described
from shardsmith.hooks.live_directory import LiveDirectory
from tests.families.tiny import all_families, make_tiny
from tests.hooks.live_models import from_transformers
from tests.ranks import run_on_ranks
from tests.trained_runs import TOKENS, build

FAMILIES = {family.kind: family for family in all_families()}


class Spoiler:
    """A processor that changes what is in the directory when it is saved."""

    def __init__(self, change: Any) -> None:
        self.change = change

    def save_pretrained(self, directory: Path) -> None:
        self.change(Path(directory))


def export_of(directory: Path, model: nn.Module, **options: Any) -> HFExport:
    return HFExport(directory, model=model, when=at(1), verify="load", **options)


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_a_sharded_run_exports_what_loads_and_answers_alike_and_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    run_on_ranks(run_sharded, 2, tmp_path, tmp_path)
    assert names(tmp_path) >= {"step-1", "step-1-ema"}


def run_sharded(directory: Path) -> None:
    model = build("qwen2")
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=MixedPrecisionPolicy(torch.bfloat16))
    fully_shard(model, mp_policy=MixedPrecisionPolicy(torch.bfloat16, output_dtype=torch.float32))
    model.train()
    model.model.norm.eval()
    ema = EMA(model, decay=0.5)
    for parameter in model.parameters():
        parameter.data.mul_(1.5)  # so that the average is something else
    export = export_of(directory, model, ema=ema, ema_as="directory", dtype="float32")
    random = torch.get_rng_state()
    before = {name: parameter.to_local().clone() for name, parameter in model.named_parameters()}
    export.export(1)
    assert all(torch.equal(before[name], parameter.to_local()) for name, parameter in model.named_parameters())
    assert torch.equal(random, torch.get_rng_state())
    assert model.training
    assert not model.model.norm.training
    model(input_ids=TOKENS).logits.sum().backward()
    export.close()
    dist.barrier()


def change_the_config(directory: Path) -> None:
    path = directory / "config.json"
    text = path.read_text()
    assert json.loads(text)["rms_norm_eps"] == 1e-06
    path.write_text(text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e+00'))


def spoil_the_config(directory: Path) -> None:
    path = directory / "config.json"
    path.write_text(path.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (change_the_config, "its answers differ from the live model's by"),
        (spoil_the_config, r"model\.layers\.2\.\S+: in the model, not in the files"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_does_not_load_or_answers_something_else_never_appears(tmp_path: Path, change: Any, said: str) -> None:
    export = export_of(tmp_path, build("llama"), dtype="float32", processor=Spoiler(change))
    export.export(1)
    with pytest.raises((CorruptCheckpointError, MismatchError), match=said):
        export.close()
    assert names(tmp_path) == set()


def test_inputs_are_made_up_for_images_and_asked_for_otherwise(tmp_path: Path) -> None:
    images = from_transformers("vit")
    directory = LiveDirectory("", {"main": "model"})
    assert Answers(images, None, None).check_for(directory) is not None
    assert Answers(images, None, None).check_for(LiveDirectory("", {"ema": "ema"})) is None

    class Waves(type(images)):  # type: ignore[misc]
        main_input_name = "waves"

        def forward(self, waves: Tensor) -> Tensor:
            return waves

    with pytest.raises(UsageError, match=r"it wants waves.*Pass verify_inputs="):
        export_of(tmp_path, Waves(images.config))
    inputs = {"pixel_values": torch.zeros(1, 3, 16, 16)}
    assert Answers(images, None, inputs).check_for(directory) is not None


def test_models_that_transformers_cannot_load_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="transformers has no Linear"):
        export_of(tmp_path, nn.Linear(3, 2))
    with pytest.raises(UsageError, match="verify='all'"):
        HFExport(tmp_path, model=nn.Linear(3, 2), when=at(1), verify="all")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "asked"),
    [
        ("LlamaForCausalLM", "input_ids, attention_mask"),
        ("LlavaForConditionalGeneration", "input_ids, attention_mask, pixel_values"),
    ],
)
def test_the_log_says_what_a_loaded_model_was_asked(
    kind: str, asked: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_tiny(FAMILIES[kind])
    with caplog.at_level(logging.INFO):
        export = export_of(tmp_path, model)
        export.export(1)
        export.close()
    said = f"; loaded, it answers as the live model to made-up {asked}"
    assert any(record.getMessage().endswith(said) for record in caplog.records if "exported" in record.getMessage())
    text = {name: torch.ones(1, 4) for name in ("input_ids", "attention_mask")}
    alone = kind.startswith("Llava")
    assert ("how it takes an image is not known" in _described(model, text)) == alone
