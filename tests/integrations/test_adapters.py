"""Trainer with a model of peft: the average of the adapter, and exports of it, alone or merged."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.multiprocessing import ProcessRaisedException

from shardsmith.errors import UsageError
from shardsmith.hooks import EMA, HFExport, last
from shardsmith.hooks.adapters import MergedView
from tests.integrations.trainer_runs import (
    RESUMED,
    STEPS,
    Case,
    assert_close,
    assert_equal,
    averaged,
    make_model,
    run,
)

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # by peft

Finished = Callable[[Case], Path]
SHARDINGS = [("none", 1), ("ddp", 2), ("fsdp2", 2)]


def case_of(sharding: str, ranks: int, **hooks: Any) -> Case:
    return Case(kind="lora", sharding=sharding, ranks=ranks, hooks=hooks)


def adapted(directory: Path) -> dict[str, Tensor]:
    """What peft makes of the base model and a directory with an adapter: the merged model's weights."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(make_model("llama"), directory)
    return dict(model.merge_and_unload().state_dict())


def merged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same of a state dict with the adapter in it."""
    model: Any = make_model("lora")
    model.load_state_dict(state)
    return dict(model.merge_and_unload().state_dict())


@pytest.mark.parametrize(("sharding", "ranks"), SHARDINGS)
def test_the_adapter_is_exported_as_peft_saves_it(tmp_path: Path, sharding: str, ranks: int) -> None:
    run(case_of(sharding, ranks), tmp_path)
    truth = torch.load(tmp_path / "truth.pt")
    export = tmp_path / "out-hf" / f"step-{STEPS}"
    assert {path.name for path in export.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "shardsmith.json",
    }
    assert_close(adapted(export), {name: value.double() for name, value in merged(truth["main"]).items()})
    average = {name: value.float() for name, value in averaged(truth["history"]).items()}
    assert_close(adapted(export.with_name(f"step-{STEPS}-ema")), {n: v.double() for n, v in merged(average).items()})
    saved = tmp_path / "out" / f"checkpoint-{STEPS}" / "adapter_model.safetensors"
    if saved.exists():
        assert_equal(load_file(export / saved.name), load_file(saved))


@pytest.mark.parametrize(("sharding", "ranks"), [SHARDINGS[0], SHARDINGS[2]])
def test_a_merged_export_is_a_model_of_its_own_and_the_run_does_not_notice(
    tmp_path: Path, sharding: str, ranks: int
) -> None:
    from transformers import AutoModelForCausalLM

    run(case_of(sharding, ranks, adapters="merged", ema_as="directory"), tmp_path)
    truth = torch.load(tmp_path / "truth.pt")
    exports = tmp_path / "out-hf"
    average = {name: value.float() for name, value in averaged(truth["history"]).items()}
    for name, state in ((f"step-{STEPS}", truth["main"]), (f"step-{STEPS}-ema", average)):
        model, info = AutoModelForCausalLM.from_pretrained(
            exports / name, dtype=torch.float32, output_loading_info=True
        )
        assert not any(info.values())
        assert_close(dict(model.state_dict()), {name: value.double() for name, value in merged(state).items()})
    plain = {n: v for n, v in truth["history"][0].items() if "lora" not in n and "modules_to_save" not in n}
    assert_equal({name: truth["main"][name] for name in plain}, plain)


@pytest.mark.parametrize(("sharding", "ranks"), [SHARDINGS[0], SHARDINGS[2]])
def test_a_resumed_adapter_goes_on_exactly(finished: Finished, tmp_path: Path, sharding: str, ranks: int) -> None:
    case = case_of(sharding, ranks)
    before = finished(case) / "out" / f"checkpoint-{RESUMED}"
    shutil.copytree(before, tmp_path / "out" / before.name)
    run(case, tmp_path, resume=str(tmp_path / "out" / before.name))
    straight, again = (torch.load(directory / "truth.pt") for directory in (finished(case), tmp_path))
    assert_equal(again["main"], straight["main"])
    assert_equal(again["ema"], straight["ema"])


def test_an_average_that_cannot_be_merged_leaves_no_weights_to_the_next_export() -> None:
    model: Any = make_model("lora")
    ema, view = EMA(model, decay=0.5), MergedView(model)
    with ema.staging(), pytest.raises(UsageError, match="swap the average in"), view.ready(ema):
        pytest.fail("there is nothing to export")
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    with view.ready(ema):
        found = {kind: view.values(kind) for kind in ("main", "ema")}
        live = merged(model.state_dict())
        with ema.swapped_in():
            average = merged(model.state_dict())
    for kind, wanted in (("main", live), ("ema", average)):
        # peft's names of the layers that it wraps, and of the whole
        names = {name: name.removeprefix("base_model.model.").replace(".base_layer", "") for name in found[kind]}
        assert_close(
            {names[name]: value for name, value in found[kind].items()}, {n: wanted[n] for n in names.values()}
        )


def test_a_merge_that_fails_leaves_the_live_weights_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = make_model("lora")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layers = [layer for layer in model.modules() if hasattr(layer, "unmerge") and hasattr(layer, "base_layer")]
    merge_last = layers[-1].merge

    def merge_and_fail() -> None:
        merge_last()
        raise MemoryError("no room for a copy")

    monkeypatch.setattr(layers[-1], "merge", merge_and_fail)
    with pytest.raises(MemoryError), MergedView(model).ready(None):
        pytest.fail("there is nothing to export")
    assert_equal(dict(model.state_dict()), before)
    assert not any(layer.merged for layer in layers)


def test_single_rows_of_an_embedding_are_merged_as_peft_merges_them(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 5])
    model: Any = get_peft_model(make_model("llama"), config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.normal_()
    places = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    export = HFExport(tmp_path / "hf", model=model, when=last(), adapters="merged", dtype="original")
    export.export(1)
    export.close()
    # The optimizer and what shards the model know the weights by where they are.
    assert {name: weight.data_ptr() for name, weight in model.named_parameters()} == places
    merged_by_peft = model.merge_and_unload()
    merged_by_peft.save_pretrained(tmp_path / "library")
    assert_equal(
        load_file(tmp_path / "hf" / "step-1" / "model.safetensors"),
        load_file(tmp_path / "library" / "model.safetensors"),
    )


def test_a_base_model_beside_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="pass processor="):
        HFExport(tmp_path / "hf", model=make_model("lora"), when=last(), base_model=tmp_path)


def test_under_fsdp1_the_adapter_is_exported_alone_and_merging_is_refused(tmp_path: Path) -> None:
    """Without Trainer's own saves, in which peft does not find ``modules_to_save`` under FSDP1."""
    case = Case(kind="lora", sharding="fsdp1", arguments={"save_strategy": "no"})
    run(case, tmp_path / "alone")
    truth = torch.load(tmp_path / "alone" / "truth.pt")
    export = tmp_path / "alone" / "out-hf" / f"step-{STEPS}"
    assert_close(adapted(export), merged(truth["main"]))
    assert_close(adapted(export.with_name(f"{export.name}-ema")), merged(averaged(truth["history"])))
    with pytest.raises(ProcessRaisedException, match="under FSDP1 an adapter cannot be merged"):
        run(replace(case, hooks={"adapters": "merged"}), tmp_path / "merged")
