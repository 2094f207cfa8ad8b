"""``to-hf`` of LoRA runs: the adapter alone and merged, against what peft itself loads and merges."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from shardsmith.cli import main
from shardsmith.export.adapters import ADAPTER_CONFIG_FILE, MergedSource, open_merged
from shardsmith.formats.by_path import detect_checkpoint_format, open_source
from shardsmith.tensors.tensors import read_tensor
from tests.dcp_directories import save

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # by peft

TINY: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 64}


def llama(**more: Any) -> Any:
    config = transformers.LlamaConfig(**TINY, intermediate_size=24, num_key_value_heads=2, **more)
    return transformers.LlamaForCausalLM(config)


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_head=2, n_layer=2, vocab_size=64))


def t5() -> Any:
    config = transformers.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=64)
    return transformers.T5ForConditionalGeneration(config)


KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lora": (llama, {"target_modules": ["q_proj", "v_proj"]}),
    "rank stabilised, by pattern": (
        llama,
        {"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "rank_pattern": {"q_proj": 2}},
    ),
    "dora": (llama, {"target_modules": ["k_proj", "gate_proj"], "use_dora": True}),
    "with a head that is trained": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "with biases": (gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "lora_only"}),
    "embeddings": (llama, {"target_modules": ["embed_tokens", "o_proj"]}),
    "tied": (lambda: llama(tie_word_embeddings=True), {"target_modules": ["q_proj", "up_proj"]}),
    "single rows": (llama, {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5]}),
    "single rows, tied": (
        lambda: llama(tie_word_embeddings=True),
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 5]}},
    ),
    "encoder and decoder": (t5, {"target_modules": ["q", "wo"]}),
}


def make_run(tmp_path: Path, kind: str, *, whole: bool = True) -> tuple[Any, Path, Path]:
    """A tuned model, its base on disk, and the folder that accelerate writes of it."""
    make, options = KINDS[kind]
    torch.manual_seed(0)
    model = make().eval()
    base, checkpoint = tmp_path / "base", tmp_path / "run" / "checkpoint-9"
    model.save_pretrained(base)
    tuned = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, **options)).eval()
    for name, value in tuned.named_parameters():
        if "trainable_tokens" in name:  # which begin as the rows that they stand for
            value.data.normal_()
    state = {name: value for name, value in tuned.state_dict().items() if whole or is_trained(name)}
    save({"model": state}, checkpoint / "pytorch_model_fsdp_0")
    tuned.peft_config["default"].save_pretrained(str(checkpoint))
    return tuned, base, checkpoint


def is_trained(name: str) -> bool:
    return any(part in name for part in ("lora_", "modules_to_save", "trainable_tokens"))


def logits(model: Any) -> Tensor:
    ids = torch.arange(8)[None]
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model.eval()(ids, **more).logits


def to_hf(checkpoint: Path, base: Path, out: Path, *options: str) -> int:
    places = ["--checkpoint", checkpoint, "--base-model", base, "--output-dir", out]
    return main(["to-hf", *map(str, places), "--dtype", "original", "--quiet", *options])


@pytest.mark.parametrize("whole", [True, False], ids=["whole model", "adapter alone"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_what_peft_loads(tmp_path: Path, kind: str, whole: bool) -> None:
    tuned, base, checkpoint = make_run(tmp_path, kind, whole=whole or kind == "with biases")
    out = tmp_path / "out"
    assert to_hf(checkpoint, base, out) == 0
    assert not (out / "config.json").exists()
    loaded = PeftModel.from_pretrained(type(tuned.get_base_model()).from_pretrained(base), str(out))
    assert torch.equal(logits(loaded), logits(tuned))


@pytest.mark.parametrize("whole", [True, False], ids=["whole model", "adapter alone"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_export_is_what_peft_merges(tmp_path: Path, kind: str, whole: bool) -> None:
    tuned, base, checkpoint = make_run(tmp_path, kind, whole=whole or kind == "with biases")
    kind_of_model = type(tuned.get_base_model())
    out = tmp_path / "out"
    assert to_hf(checkpoint, base, out, "--adapters", "merged", "--allow", "lm_head.weight") == 0
    loaded, info = kind_of_model.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    merged = tuned.merge_and_unload()
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=0, atol=1e-6)


class Slow:
    """An attribute after whose setting other threads have their turn."""

    def __get__(self, owner: Any, kind: type) -> Any:
        return vars(owner)["slow"]

    def __set__(self, owner: Any, value: Any) -> None:
        vars(owner)["slow"] = value
        time.sleep(0.01)


def test_threads_that_read_a_merged_model_get_their_own_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, base, checkpoint = make_run(tmp_path, "lora")
    monkeypatch.setattr(MergedSource, "_last", Slow(), raising=False)
    with contextlib.closing(open_merged(open_source(checkpoint / "pytorch_model_fsdp_0"), checkpoint, base)) as merged:
        names = [name for name in merged.specs if "q_proj" in name or "v_proj" in name]
        alone = {name: read_tensor(merged, name).clone() for name in names}
        asked = names * 5
        with ThreadPoolExecutor(4) as threads:
            read = threads.map(lambda name: read_tensor(merged, name).clone(), asked)
            assert all(torch.equal(value, alone[name]) for name, value in zip(asked, read, strict=True))


def test_the_base_models_weights_are_named_where_they_are_needed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, base, checkpoint = make_run(tmp_path, "lora", whole=False)
    (base / "model.safetensors").unlink()
    assert to_hf(checkpoint, base, tmp_path / "out", "--adapters", "merged") == 2
    assert re.search(r"(?s)neither in the checkpoint nor in the base.*--adapters adapter", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_its_adapter_config_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, base, checkpoint = make_run(tmp_path, "lora")
    (checkpoint / ADAPTER_CONFIG_FILE).unlink()
    assert to_hf(checkpoint, base, tmp_path / "out") == 2
    assert re.search(r"adapter of peft.*save_pretrained\(DIRECTORY\)", capsys.readouterr().err)


@pytest.mark.parametrize("inside", ["", ".weight"])
def test_lora_matrices_beside_their_weight_are_not_taken_for_those_of_peft(
    inside: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # So loralib names them, and layers made by hand: such a model has no peft_config that could be saved.
    model = llama()
    model.save_pretrained(tmp_path / "base")
    layer = "model.layers.0.self_attn.q_proj"
    weights = {f"{layer}.lora_A{inside}": torch.ones(2, 16), f"{layer}.lora_B{inside}": torch.ones(16, 2)}
    torch.save(model.state_dict() | weights, tmp_path / "model.pt")
    assert to_hf(tmp_path / "model.pt", tmp_path / "base", tmp_path / "out") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "merge them into the weight" in said, said
    assert "peft" not in said, said
    assert "--drop" not in said, said
    # What it says works.
    with torch.no_grad():
        model.get_submodule(layer).weight += weights[f"{layer}.lora_B{inside}"] @ weights[f"{layer}.lora_A{inside}"]
    torch.save(model.state_dict(), tmp_path / "model.pt")
    assert to_hf(tmp_path / "model.pt", tmp_path / "base", tmp_path / "out") == 0
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded.eval()), logits(model.eval()))


def test_the_advice_for_a_missing_adapter_config_names_the_runs_own_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, base, checkpoint = llama(), tmp_path / "base", tmp_path / "ck"
    model.save_pretrained(base)
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False), adapter_name="actor")
    save(model.state_dict(), checkpoint)
    assert to_hf(checkpoint, base, tmp_path / "out", "--dtype", "original") == 2
    advice = re.search(r"(model\.peft_config.*)\(DIRECTORY\)", capsys.readouterr().err.replace("\n", " "))
    assert advice is not None
    eval(advice[1], {"model": model})(str(checkpoint))
    assert to_hf(checkpoint, base, tmp_path / "out", "--dtype", "original") == 0
    loaded = PeftModel.from_pretrained(type(model.get_base_model()).from_pretrained(base), tmp_path / "out")
    assert torch.equal(logits(loaded), logits(model))


def test_an_adapter_that_changed_its_base_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned, base, checkpoint = make_run(tmp_path, "lora")
    tuned.peft_config["default"].init_lora_weights = "pissa"
    tuned.peft_config["default"].save_pretrained(str(checkpoint))
    assert to_hf(checkpoint, base, tmp_path / "out") == 2
    assert "changed the base model's weights" in capsys.readouterr().err


def in_layers(name: str, wrapper: str) -> str:
    return re.sub(r"\.layers\.(\d+)\.", rf".layers.\1.{wrapper}.", name)


WRAPPED: dict[str, Callable[[str], str]] = {
    "an attribute": lambda name: f"policy.backbone.{name}",
    "a LightningModule's model": lambda name: f"model.{name}",
    "DDP": lambda name: f"module.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "layers compiled": lambda name: in_layers(name, "_orig_mod"),
    "layers checkpointed, in an attribute": lambda name: f"net.{in_layers(name, '_checkpoint_wrapped_module')}",
}


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("wrapped", WRAPPED)
def test_a_peft_model_in_a_wrapper_is_exported_as_without_it(tmp_path: Path, wrapped: str, whole: bool) -> None:
    tuned, base, _ = make_run(tmp_path, "lora")
    state = {WRAPPED[wrapped](n): value for n, value in tuned.state_dict().items() if whole or is_trained(n)}
    checkpoint = tmp_path / "wrapped"
    save(state, checkpoint)
    tuned.peft_config["default"].save_pretrained(str(checkpoint))
    assert to_hf(checkpoint, base, tmp_path / "adapter") == 0
    tuned.save_pretrained(str(tmp_path / "peft"))
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "peft"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert to_hf(checkpoint, base, tmp_path / "merged", "--adapters", "merged") == 0
    merged = tuned.merge_and_unload().state_dict()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in merged.items())


@pytest.mark.parametrize("adapters", ["adapter", "merged"])
def test_an_adapter_config_of_another_run_is_refused(
    tmp_path: Path, adapters: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, base, checkpoint = make_run(tmp_path, "lora")
    LoraConfig(r=4, target_modules=["o_proj"]).save_pretrained(str(checkpoint))
    assert to_hf(checkpoint, base, tmp_path / "out", "--adapters", adapters) == 2
    assert "are not where adapter_config.json and the base model have them" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_embeddings_of_a_resized_vocabulary_go_along(tmp_path: Path) -> None:
    model = llama().eval()
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(TINY["vocab_size"] + 4)
    tuned = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"]))
    checkpoint = tmp_path / "run" / "checkpoint-9"
    save({"model": tuned.state_dict()}, checkpoint / "pytorch_model_fsdp_0")
    tuned.save_pretrained(str(tmp_path / "peft"), save_embedding_layers=True)
    tuned.peft_config["default"].save_pretrained(str(checkpoint))
    assert to_hf(checkpoint, tmp_path / "base", tmp_path / "out") == 0
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "peft"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_of_two_adapters_the_advice_leads_to_the_one_of_the_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    torch.manual_seed(0)
    model, base, checkpoint = llama().eval(), tmp_path / "base", tmp_path / "ck"
    model.save_pretrained(base)
    tuned = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"])).eval()
    more = {"modules_to_save": ["lm_head"], "use_dora": True, "target_modules": ["q_proj", "up_proj"]}
    tuned.add_adapter("second", LoraConfig(r=2, init_lora_weights=False, **more))
    tuned.set_adapter("default")
    expected = logits(tuned)
    save({"model": dict(tuned.state_dict())}, checkpoint)
    tuned.peft_config["default"].save_pretrained(str(checkpoint))
    assert to_hf(checkpoint, base, tmp_path / "out", "--adapters", form) == 2
    said = " ".join(capsys.readouterr().err.split())
    advised = re.search(r"--drop(( '[^']+')+)", said)
    assert advised is not None, said
    options = ["--adapters", form, "--drop", *re.findall("'(.+?)'", advised[1])]
    assert to_hf(checkpoint, base, tmp_path / "out", *options) == 0
    loaded = transformers.AutoModelForCausalLM.from_pretrained(base if form == "adapter" else tmp_path / "out")
    loaded = PeftModel.from_pretrained(loaded, tmp_path / "out") if form == "adapter" else loaded
    assert torch.allclose(logits(loaded.eval()), expected, atol=1e-4)
    # The config of the other one does not go with these tensors, and peft would not load them.
    tuned.peft_config["second"].save_pretrained(str(checkpoint))
    assert to_hf(checkpoint, base, tmp_path / "wrong", *options) == 2


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_detect_says_how_a_folder_of_peft_becomes_a_model(form: str, tmp_path: Path) -> None:
    tuned, base, _ = make_run(tmp_path, "lora")
    folder = tmp_path / "adapter"
    tuned.save_pretrained(folder)
    if form == "bin":
        file = folder / "adapter_model.safetensors"
        torch.save(load_file(file), folder / "adapter_model.bin")
        file.unlink()
    reason = detect_checkpoint_format(folder).reason
    assert reason.startswith("an adapter of peft, which is no model by itself; ")
    command = reason.partition("; ")[2].removesuffix(" makes one of it").replace("BASE", str(base)).split()
    assert main([*command, "--output-dir", str(tmp_path / "out"), "--dtype", "float32"]) == 0
    merged = load_file(tmp_path / "out" / "model.safetensors")
    expected = tuned.merge_and_unload().state_dict()
    assert merged.keys() == expected.keys()
    assert all(torch.allclose(merged[name], expected[name], atol=1e-6) for name in expected)
