"""An export is compared with the class that its own config.json names, before it becomes visible.

Every case is judged by the library's own ``from_pretrained``.
"""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shardsmith.errors import MismatchError
from shardsmith.export.check import ExportCheck
from shardsmith.export.plan import ExportOptions, choose_stems, plan_directory
from shardsmith.export.write import write_directories
from shardsmith.hf.config_fit import fit_config
from shardsmith.hf.directory_check import refusal
from shardsmith.hooks import HFExport, Hooks, every
from shardsmith.tensors.tensors import TensorSpec

AS_STORED = ExportOptions(dtype=None)


def to_hf(checkpoint: Path, base: Path, output: Path, **options: Any) -> ExportCheck:
    """What the command does, in this process."""
    (stems,) = [stem for _, stem in choose_stems(checkpoint, base, "main", "auto")]
    chosen = ExportOptions(dtype=options.pop("dtype", None), **options)
    (check,) = write_directories([plan_directory(checkpoint, output, base, stems, chosen)])
    return check


def export_live(model: nn.Module, base: Path | None, output: Path, **options: Any) -> Path:
    hooks = Hooks(HFExport(output, model=model, base_model=base, when=every(1), dtype="original", **options))
    hooks.step(1)
    hooks.close()
    return output / "step-1"


def saved(state: Mapping[str, Tensor], path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.save(dict(state), checkpoint_id=path, no_dist=True)
    return path


def config_of(directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return content


def weightless(base: Path, path: Path, **changes: Any) -> Path:
    """The config alone, with some entries changed."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**config_of(base), **changes}))
    return path


def assert_loads(directory: Path, state: Mapping[str, Tensor], kind: Any) -> None:
    model, info = kind.from_pretrained(directory, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    assert [name for name, value in state.items() if not torch.equal(loaded[name], value)] == []


def llama(**changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**{**sizes, "num_key_value_heads": 2, "vocab_size": 50, **changes})
    return transformers.LlamaForCausalLM(config).eval()


def paligemma() -> Any:
    """Its text model, three parts deep, has the vocabulary."""
    torch.manual_seed(0)
    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**text, vocab_size=50),
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=16, patch_size=8),
        image_token_index=49,
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


def changed(model: nn.Module) -> dict[str, Tensor]:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(level)


@pytest.mark.parametrize("make", [llama, paligemma], ids=["flat", "nested"])
def test_a_vocabulary_that_was_resized_is_in_the_config_at_its_depth(make: Callable[[], Any], tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path / "base")
    bare = weightless(tmp_path / "base", tmp_path / "bare")
    model.resize_token_embeddings(55, mean_resizing=False)
    state = changed(model)
    check = to_hf(saved(state, tmp_path / "ck"), bare, tmp_path / "out")
    assert "55 instead of 50" in check.config_changes[0]
    assert_loads(tmp_path / "out", state, type(model))
    for base in (bare, tmp_path / "base"):  # the live model's own config says so, whatever the base's weights are
        assert_loads(export_live(model, base, tmp_path / f"live-{base.name}"), state, type(model))


def test_beside_weights_of_the_base_a_resized_vocabulary_has_to_be_allowed(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(55, mean_resizing=False)
    state = changed(model)
    checkpoint = saved(state, tmp_path / "ck")
    with pytest.raises(MismatchError, match=r"--allow 'lm_head.weight' .*vocab_size: 55 instead of 50"):
        to_hf(checkpoint, tmp_path / "base", tmp_path / "out")
    check = to_hf(checkpoint, tmp_path / "base", tmp_path / "out", allow=("*embed_tokens*", "lm_head*"))
    assert (check.models[0].compared, check.models[0].tensors) == (len(state) - 2, len(state))
    assert_loads(tmp_path / "out", state, type(model))


SCHEMES = {
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_plain_weights_have_no_scheme_of_a_quantisation_beside_them(scheme: str, tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    bare = weightless(tmp_path / "base", tmp_path / "bare", quantization_config=SCHEMES[scheme])
    state = changed(model)
    to_hf(saved(state, tmp_path / "ck"), bare, tmp_path / "out")
    for directory in (tmp_path / "out", export_live(model, bare, tmp_path / "live")):
        assert "quantization_config" not in config_of(directory)
        assert_loads(directory, state, type(model))


def test_scales_of_quantised_weights_keep_their_dtype_unless_they_are_named(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    state: dict[str, Tensor] = {}
    for name, value in load_file(tmp_path / "base" / "model.safetensors").items():
        if "_proj." not in name:
            state[name] = value.bfloat16()
            continue
        scale = value.abs().max() / 448
        state[name] = (value / scale).to(torch.float8_e4m3fn)
        state[name.replace("weight", "weight_scale_inv")] = scale.reshape(1, 1)
    base = weightless(tmp_path / "base", tmp_path / "fp8", quantization_config=SCHEMES["fp8"])
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    checkpoint = saved(state, tmp_path / "ck")
    to_hf(checkpoint, base, tmp_path / "out", dtype=torch.bfloat16)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name].view(torch.uint8), state[name].view(torch.uint8)) for name in state)
    assert config_of(tmp_path / "out")["dtype"] == "bfloat16"
    to_hf(checkpoint, base, tmp_path / "named", dtype={"*_scale_inv": torch.bfloat16, "*": None})
    assert load_file(tmp_path / "named" / "model.safetensors")["model.layers.0.mlp.up_proj.weight_scale_inv"].dtype is (
        torch.bfloat16
    )


def test_a_head_that_is_no_longer_the_embedding_is_not_called_tied(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    bare = weightless(tmp_path / "base", tmp_path / "bare")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight + 0.25)
    state = changed(model)
    checkpoint = saved(state, tmp_path / "ck")
    with pytest.raises(MismatchError, match="tie_word_embeddings: false") as refusal:
        to_hf(checkpoint, tmp_path / "base", tmp_path / "out")
    assert "--drop" not in str(refusal.value)
    to_hf(checkpoint, bare, tmp_path / "out")
    to_hf(checkpoint, tmp_path / "base", tmp_path / "allowed", allow=("lm_head.weight",))
    for directory in (tmp_path / "out", tmp_path / "allowed", export_live(model, bare, tmp_path / "live")):
        assert config_of(directory)["tie_word_embeddings"] is False
        assert_loads(directory, state, type(model))


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])  # the second's config has a word for each layer, too
def test_another_number_of_layers_is_refused_by_its_key_and_no_layer_is_dropped(
    kind: str, layers: int, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    config_class, model_class = (getattr(transformers, kind + end) for end in ("Config", "ForCausalLM"))
    base, model = (
        model_class(config_class(**sizes, head_dim=4, vocab_size=50, num_hidden_layers=n)) for n in (2, layers)
    )
    base.save_pretrained(tmp_path / "base")
    state = changed(model)
    checkpoint = saved(state, tmp_path / "ck")
    said = f"config.json says num_hidden_layers: 2, and these are the tensors of {layers}"
    with pytest.raises(MismatchError, match=said) as refusal:
        to_hf(checkpoint, tmp_path / "base", tmp_path / "out")
    assert "--drop" not in str(refusal.value)
    assert "Or correct num_hidden_layers" in str(refusal.value)
    cure: dict[str, Any] = {"num_hidden_layers": layers}
    if "layer_types" in config_of(tmp_path / "base"):
        assert "config.json says layer_types: of 2 layers" in str(refusal.value)
        cure["layer_types"] = ["full_attention"] * layers
    to_hf(checkpoint, weightless(tmp_path / "base", tmp_path / "bare", **cure), tmp_path / "out")
    assert_loads(tmp_path / "out", state, model_class)


def test_another_head_is_refused_by_the_key_of_the_config_and_taken_from_a_live_model(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    bare = weightless(tmp_path / "base", tmp_path / "bare")
    config = llama().config
    config.num_labels = 3
    model = transformers.LlamaForSequenceClassification(config)
    state = changed(model)
    with pytest.raises(MismatchError, match=r"config\.json says architectures: LlamaForCausalLM"):
        to_hf(saved(state, tmp_path / "ck"), bare, tmp_path / "out")
    assert_loads(export_live(model, bare, tmp_path / "live"), state, type(model))


UNKNOWN: dict[str, Callable[[str], str]] = {
    "one part of a name": lambda name: name.replace("q_proj", "query"),
    "order": lambda name: name.replace("model.layers", "layers.model"),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_with_a_config_alone_names_of_another_model_are_not_written(kind: str, tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    state = changed(model)
    checkpoint = saved({UNKNOWN[kind](name): value for name, value in state.items()}, tmp_path / "ck")
    with pytest.raises(MismatchError, match="LlamaForCausalLM"):
        to_hf(checkpoint, weightless(tmp_path / "base", tmp_path / "bare"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def unet() -> Any:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D")}
    return diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, **blocks
    )


def test_a_component_of_diffusers_is_exported_as_diffusers_loads_it(tmp_path: Path) -> None:
    model = unet()
    model.save_pretrained(tmp_path / "base")
    shutil.copy(tmp_path / "base" / "diffusion_pytorch_model.safetensors", tmp_path / "base" / "other.safetensors")
    bare = weightless(tmp_path / "base", tmp_path / "bare")
    state = changed(model)
    checkpoint = saved(state, tmp_path / "ck")
    for base in (tmp_path / "base", bare):
        check = to_hf(checkpoint, base, tmp_path / f"out-{base.name}")
        assert "UNet2DModel of diffusers" in check.compared
    directories = [
        tmp_path / "out-base",
        tmp_path / "out-bare",
        export_live(model, tmp_path / "base", tmp_path / "live"),
        export_live(model, None, tmp_path / "alone"),
        export_live(model, tmp_path / "base", tmp_path / "sharded", max_shard_size="20KB"),
    ]
    for directory in directories:
        assert not list(directory.glob("model*")) + list(directory.glob("other*"))
        loaded = diffusers.UNet2DModel.from_pretrained(directory).state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in state.items())


def test_weights_of_the_base_under_any_name_do_not_come_along(tmp_path: Path) -> None:
    model = llama()
    base = tmp_path / "base"
    model.save_pretrained(base)
    own, other = load_file(base / "model.safetensors"), {"decoder.weight": torch.zeros(3, 4)}
    for name in ("model.fp16.safetensors", "mine.safetensors"):
        save_file(own, base / name, metadata={"format": "pt"})
    torch.save(own, base / "mine.bin")
    save_file(other, base / "ae.safetensors")
    save_file({"base_model.model.q_proj.lora_A.weight": torch.zeros(2, 2)}, base / "adapter_model.safetensors")
    for name in ("adapter_config.json", "trainer_state.json", "training_args.bin"):
        (base / name).write_text("{}")
    state = changed(model)
    check = to_hf(saved(state, tmp_path / "ck"), base, tmp_path / "out")
    live = export_live(model, base, tmp_path / "live")
    expected = {"ae.safetensors", "config.json", "generation_config.json", "model.safetensors", "shardsmith.json"} | {
        "README.md"
    }
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in live.iterdir()} == expected
    assert check.copied_weights == {"ae.safetensors": (base / "ae.safetensors").stat().st_size}
    assert_loads(tmp_path / "out", state, type(model))


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
@pytest.mark.parametrize("max_shard_size", ["3KB", "5GB"])
def test_variants_of_a_base_do_not_stop_an_export(variant: str, max_shard_size: str, tmp_path: Path) -> None:
    model, base = llama(), tmp_path / "base"
    for save in ({}, {"variant": variant, "max_shard_size": max_shard_size}):
        model.save_pretrained(base, **save)
    shutil.copy(base / "model.safetensors", base / "model.safetensors.bak")
    state = {name: value + 1 for name, value in model.state_dict().items()}
    to_hf(saved(state, tmp_path / "ck"), base, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("model*")] == ["model.safetensors"]
    assert_loads(tmp_path / "out", state, type(model))
    live = export_live(model, base, tmp_path / "live")
    assert [path.name for path in live.glob("model*")] == ["model.safetensors"]


def test_a_file_of_the_users_that_a_loader_would_take_is_refused(tmp_path: Path) -> None:
    model = llama()
    stray = tmp_path / "stray.bin"
    torch.save(model.state_dict(), stray)
    with pytest.raises(MismatchError, match=r"model\.bin: a loader would take it"):
        export_live(model, None, tmp_path / "live", extra_files={"pytorch_model.bin": stray})
    assert not (tmp_path / "live" / "step-1").exists()


def test_where_no_class_is_known_the_first_line_the_json_and_the_log_say_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"hidden": 3}))
    checkpoint = saved(model.state_dict(), tmp_path / "ck")
    said = "not compared with any model: config.json names no class"
    assert to_hf(checkpoint, base, tmp_path / "out").compared == said
    with caplog.at_level(logging.INFO):
        live = export_live(model, base, tmp_path / "live")
    assert any(said in record.getMessage() for record in caplog.records)
    assert json.loads((live / "shardsmith.json").read_text())["compared"] == said
    save_file(model.state_dict(), base / "model.safetensors")
    assert "compared with model.safetensors of the base model" in to_hf(checkpoint, base, tmp_path / "two").compared


def test_differences_that_the_base_has_itself_are_not_held_against_an_export(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    state = {f"own.{name}": value for name, value in llama().state_dict().items()}
    save_file(state, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    check = to_hf(saved(state, tmp_path / "ck"), tmp_path / "base", tmp_path / "out")
    assert check.models[0].compared == len(state)


T5 = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4, "vocab_size": 48}
BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 48}
BART = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
TIED: dict[str, tuple[Any, Any]] = {
    "t5": (transformers.T5ForConditionalGeneration, transformers.T5Config(**T5, decoder_start_token_id=0)),
    "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64)),
    "bert": (transformers.BertForMaskedLM, transformers.BertConfig(**BERT)),
    "bart": (
        transformers.BartForConditionalGeneration,
        transformers.BartConfig(**BART, encoder_attention_heads=2, decoder_attention_heads=2, vocab_size=48),
    ),
}


@pytest.mark.parametrize("family", TIED)
def test_what_the_class_ties_is_written_once(family: str, tmp_path: Path) -> None:
    kind, config = TIED[family]
    torch.manual_seed(0)
    model = kind(config)
    model.save_pretrained(tmp_path / "base")
    state = changed(model)
    checkpoint = saved(state, tmp_path / "ck")
    to_hf(checkpoint, tmp_path / "base", tmp_path / "out")
    to_hf(checkpoint, weightless(tmp_path / "base", tmp_path / "bare"), tmp_path / "out-bare")
    for directory in (tmp_path / "out", tmp_path / "out-bare"):
        assert_loads(directory, state, kind)
        theirs = load_file(tmp_path / "base" / "model.safetensors")
        assert load_file(directory / "model.safetensors").keys() == theirs.keys()


def test_a_config_that_would_have_to_change_is_refused_with_what_would_change() -> None:
    model = llama()
    specs = {name: TensorSpec(name, tuple(value.shape), value.dtype) for name, value in model.state_dict().items()}
    found = fit_config({**model.config.to_dict(), "architectures": ["LlamaForCausalLM"], "vocab_size": 60}, specs)
    assert found.changes
    assert not found.problems
    summary, lines, _ = refusal(found)
    assert summary.startswith("config.json does not describe the tensors, which LlamaForCausalLM of transformers")
    assert lines == list(found.changes)
    assert "vocab_size" in lines[0]


def test_what_an_adapted_config_makes_of_the_base_excuses_nothing() -> None:
    """The base has no head in its files, for it is tied; beside a config that unties it, files without one lack it."""
    model = llama(tie_word_embeddings=True)
    tied = json.loads(model.config.to_json_string()) | {"architectures": ["LlamaForCausalLM"]}
    names = [name for name in model.state_dict() if name != "lm_head.weight"]
    specs = {name: TensorSpec(name, tuple(model.state_dict()[name].shape), torch.float32) for name in names}
    untied = tied | {"tie_word_embeddings": False}
    assert not fit_config(tied, specs, base=specs, of_base=tied).problems
    assert fit_config(untied, specs, base=specs, of_base=tied).problems
