"""What a live model computes with is what its export says, also where no tensor shows it and the base says otherwise.

The measure is the library's own ``save_pretrained`` of the same model.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from diffusers import UNet2DModel
from safetensors.torch import load_file
from transformers import AutoConfig, GenerationConfig, GPT2Config, GPT2LMHeadModel

from shardsmith.cli import main
from shardsmith.ground.layout import METADATA_FILE, MODEL_CONFIG_FILE
from shardsmith.hooks import HFExport, Hooks, ShardedSave, every
from shardsmith.manifest.metadata import sealed_json
from tests.hf.test_directory_check import config_of, export_live, saved, to_hf

pytestmark = pytest.mark.filterwarnings("ignore")
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}


def llama(kind: str = "LlamaForCausalLM", **more: Any) -> Any:
    return getattr(transformers, kind)(transformers.LlamaConfig(**{**SMALL, **more}))


def llava(**text: Any) -> Any:
    vision = {key: SMALL[key] for key in SMALL if key != "vocab_size"} | {"image_size": 16, "patch_size": 8}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision),
        text_config=transformers.LlamaConfig(**{**SMALL, **text}),
        image_token_id=60,
    )
    return transformers.LlavaForConditionalGeneration(config)


def gpt2(**more: Any) -> Any:
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=64, n_positions=32, **more))


def unet(**more: Any) -> Any:
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    return UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, **blocks, **more
    )


CASES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "angles": (llama, {"rope_parameters": LINEAR, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192}),
    "in a part": (llava, {"rope_parameters": LINEAR, "rms_norm_eps": 1e-5}),
    "switches": (gpt2, {"scale_attn_by_inverse_layer_idx": True, "layer_norm_epsilon": 1e-3}),
    "special tokens": (llama, {"pad_token_id": 3, "eos_token_id": [2, 5]}),
    "names of labels": (
        lambda **more: llama("LlamaForSequenceClassification", **more),
        {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}, "problem_type": "regression"},
    ),
    "a component": (unet, {"freq_shift": 1, "act_fn": "gelu"}),
}


def settings(directory: Path) -> dict[str, Any]:
    """What the library reads, without dtypes and versions."""
    if "_class_name" in config_of(directory):
        content = dict(UNet2DModel.load_config(directory))
    else:
        content = AutoConfig.from_pretrained(directory).to_dict()
    unmeant = {"dtype", "transformers_version", "_diffusers_version", "_name_or_path"}

    def without(part: Any) -> Any:
        return {k: without(v) for k, v in part.items() if k not in unmeant} if isinstance(part, dict) else part

    return {key: value for key, value in without(content).items() if value is not None}


def saved_step(model: Any, folder: Path, **options: Any) -> Path:
    """A step of a run, which records what the model's config says."""
    hooks = Hooks(ShardedSave(folder, model=model, when=every(1), **options))
    hooks.step(1)
    hooks.close()
    return folder / "step-1"


@pytest.mark.parametrize("name", CASES)
def test_what_the_live_model_computes_with_is_in_its_config(name: str, tmp_path: Path) -> None:
    make, changes = CASES[name]
    make().save_pretrained(tmp_path / "base")
    model = make(**changes)
    model.save_pretrained(tmp_path / "library")
    assert settings(tmp_path / "library") != settings(tmp_path / "base")
    assert settings(export_live(model, tmp_path / "base", tmp_path / "live")) == settings(tmp_path / "library")
    to_hf(saved_step(model, tmp_path / "run"), tmp_path / "base", tmp_path / "later")
    assert settings(tmp_path / "later") == settings(tmp_path / "library")
    # A model as its base has it leaves the base's config as it is, to the letter.
    to_hf(saved_step(make(), tmp_path / "run-as-base"), tmp_path / "base", tmp_path / "later-unchanged")
    for kept in (export_live(make(), tmp_path / "base", tmp_path / "unchanged"), tmp_path / "later-unchanged"):
        assert config_of(kept) == config_of(tmp_path / "base")


def test_a_step_says_what_the_model_said_when_it_was_saved(tmp_path: Path) -> None:
    """Not what the base says, nor what the model says later."""
    base = tmp_path / "base"
    llama(eos_token_id=2).save_pretrained(base)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(70)
    model.config.rope_parameters = LINEAR
    model.generation_config.eos_token_id = [2, 5]
    model.save_pretrained(tmp_path / "library")
    held = torch.nn.ModuleDict({"policy": model, "value": torch.nn.Linear(2, 1)})
    steps = [saved_step(model, tmp_path / "run"), saved_step(model, tmp_path / "one", weights="huggingface")]
    recorded = [(step / "model_config.json").read_bytes() for step in (*steps, saved_step(held, tmp_path / "held"))]
    assert len(set(recorded)) == 1
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 1.0}
    model.generation_config.eos_token_id = 3
    for number, step in enumerate(steps):
        directory = tmp_path / f"out-{number}"
        check = to_hf(step, base, directory)
        assert any("rope_parameters" in change for change in check.config_changes)
        assert settings(directory) == settings(tmp_path / "library")
        loaded = type(model).from_pretrained(directory)
        assert loaded.generation_config.eos_token_id == [2, 5]
        assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
    # A step may be a base, and what it recorded is no part of a model.
    to_hf(steps[0], steps[1], tmp_path / "of-step")
    assert not (tmp_path / "of-step" / "model_config.json").exists()


@pytest.mark.parametrize("make", [llava, unet])
def test_each_step_of_a_run_says_what_the_model_said_then(make: Callable[[], Any], tmp_path: Path) -> None:
    """Compared with runs of one step, whose first save it is."""
    model = make()
    hooks = Hooks(ShardedSave(tmp_path / "run", model=model, when=every(1)))

    def inside(_: Any) -> None:
        if isinstance(model, UNet2DModel):
            model.register_to_config(freq_shift=1)
        else:
            model.config.text_config.rope_parameters = LINEAR

    def generation(_: Any) -> None:
        if not isinstance(model, UNet2DModel):
            model.generation_config = GenerationConfig(max_length=7)

    alone = []
    for step, change in enumerate((id, id, inside, generation), start=1):
        change(model)
        hooks.step(step)
        alone.append((saved_step(model, tmp_path / f"alone-{step}") / MODEL_CONFIG_FILE).read_bytes())
    hooks.close()
    assert [(tmp_path / "run" / f"step-{step}" / MODEL_CONFIG_FILE).read_bytes() for step in range(1, 5)] == alone
    assert alone[0] == alone[1] != alone[2]


def test_a_config_that_cannot_be_written_fails_no_save(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = llama()
    model.config.to_json_string = lambda **_: 1 / 0
    step = saved_step(model, tmp_path / "run")
    assert (step / "metadata.json").is_file()
    assert not (step / "model_config.json").exists()
    assert "the config of LlamaForCausalLM is not recorded" in caplog.text


@pytest.mark.parametrize("scaling", [None, {"type": "linear", "factor": 2.0}], ids=["none", "linear"])
def test_no_older_spelling_stays_beside_what_the_live_model_says(scaling: Any, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    old = config_of(tmp_path / "base") | {"rope_theta": 10_000.0, "rope_scaling": scaling, "torch_dtype": "float32"}
    del old["rope_parameters"], old["dtype"]
    (tmp_path / "base" / "config.json").write_text(json.dumps(old))
    model = llama(rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    directory = export_live(model, tmp_path / "base", tmp_path / "live")
    assert not config_of(directory).keys() & {"rope_theta", "rope_scaling"}
    assert AutoConfig.from_pretrained(directory).rope_parameters == model.config.rope_parameters


def test_settings_of_the_training_and_a_config_that_lies_are_left_alone(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    model = llama(use_cache=False, output_hidden_states=True)
    model.config.num_hidden_layers = 3  # nobody has told the config that it has two
    directory = export_live(model, tmp_path / "base", tmp_path / "live")
    assert config_of(directory) == config_of(tmp_path / "base")


@pytest.mark.parametrize("has_base", [True, False])
def test_how_the_live_model_generates_is_written_if_it_was_changed(has_base: bool, tmp_path: Path) -> None:
    base = tmp_path / "base"
    first = llama(eos_token_id=2)
    first.generation_config = GenerationConfig(do_sample=True, temperature=0.6, eos_token_id=2)
    first.save_pretrained(base)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(base)
    if not has_base:
        (base / "generation_config.json").unlink()
    loaded.generation_config.eos_token_id = [2, 5]
    written = GenerationConfig.from_pretrained(export_live(loaded, base, tmp_path / "live"))
    assert (written.temperature, written.eos_token_id) == (0.6, [2, 5])


def test_how_the_base_generates_is_kept_if_the_live_model_says_nothing_else(tmp_path: Path) -> None:
    base = tmp_path / "base"
    first = llama(eos_token_id=2)
    first.generation_config = GenerationConfig(do_sample=True, temperature=0.6, eos_token_id=2)
    first.save_pretrained(base)
    for name, model in {"new": llama(eos_token_id=2), "loaded": type(first).from_pretrained(base)}.items():
        directory = export_live(model, base, tmp_path / name)
        expected = (base / "generation_config.json").read_bytes()
        assert (directory / "generation_config.json").read_bytes() == expected


def test_a_config_that_names_no_class_leaves_the_names_as_they_are(tmp_path: Path) -> None:
    """Any head may be meant then; the names of one class say nothing about those of another."""
    model = llama()
    model.config.architectures = None
    model.config.save_pretrained(tmp_path / "bare")
    assert not config_of(tmp_path / "bare").get("architectures")
    wrapped = {f"_orig_mod.{name}": value for name, value in model.state_dict().items()}
    to_hf(saved(wrapped, tmp_path / "ck"), tmp_path / "bare", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("source", ["live", "checkpoint"])
def test_a_later_export_says_what_the_library_would_save_then(source: str, tmp_path: Path) -> None:
    """A head that is untied, other settings, and a head that is tied again by a resize: each export is the model."""
    torch.manual_seed(0)
    model = llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    save = ShardedSave(tmp_path / "saves", model=model, when=every(1))
    options: dict[str, Any] = {"source": source, "base_model": tmp_path / "base"}
    options |= {"checkpoints": save} if source == "checkpoint" else {}
    export = HFExport(tmp_path / "hf", model=model, when=every(1), dtype="original", **options)
    hooks = Hooks(save, export)

    def is_as_the_library_saves(step: int) -> None:
        model.save_pretrained(tmp_path / f"library-{step}")
        hooks.step(step)
        export.wait()
        directory = tmp_path / "hf" / f"step-{step}"
        loaded, info = type(model).from_pretrained(directory, output_loading_info=True)
        assert not info["missing_keys"] | info["unexpected_keys"]
        assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
        assert settings(directory) == settings(tmp_path / f"library-{step}")
        assert loaded.generation_config.eos_token_id == model.generation_config.eos_token_id

    is_as_the_library_saves(1)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 1)
    model.config.tie_word_embeddings = False
    is_as_the_library_saves(2)
    model.config.rope_parameters = LINEAR
    model.generation_config.eos_token_id = [2, 5]
    is_as_the_library_saves(3)
    model.lm_head.weight = model.model.embed_tokens.weight
    model.config.tie_word_embeddings = True
    model.resize_token_embeddings(70)
    is_as_the_library_saves(4)
    hooks.close()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_said_and_not_taken_for_initial_ones(
    value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.model.norm.weight.fill_(value)
    checkpoint = saved(model.state_dict(), tmp_path / "ck")
    command = ["to-hf", "--checkpoint", str(checkpoint), "--base-model", str(tmp_path / "base")]
    assert main([*command, "--output-dir", str(tmp_path / "out")]) == 0
    said = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines() if "model.norm.weight" in line]
    assert said == ["main: NaN or infinite: model.norm.weight, to begin with; take a step from before the run diverged"]


@pytest.mark.parametrize("is_old", [False, True], ids=["", "of an older step"])
def test_the_way_back_from_one_write_keeps_what_the_model_said(is_old: bool, tmp_path: Path) -> None:
    model = llama(rope_parameters=LINEAR, max_position_embeddings=8192)
    model.generation_config = GenerationConfig(temperature=0.5, do_sample=True)
    llama().save_pretrained(tmp_path / "base")
    hooks = Hooks(ShardedSave(tmp_path / "run", model=model, when=every(1), weights="huggingface"))
    hooks.step(1)
    hooks.close()
    step = tmp_path / "run" / "step-1"
    if is_old:  # before steps recorded it
        manifest = json.loads((step / METADATA_FILE).read_text())
        del manifest["files"][MODEL_CONFIG_FILE], manifest["self_xxh3_128"]
        (step / METADATA_FILE).write_bytes(sealed_json(manifest))
        (step / MODEL_CONFIG_FILE).unlink()
    assert main(["to-dcp", "--whole", "--base-model", str(step), "--output-dir", str(tmp_path / "plain")]) == 0
    assert main(["inspect", str(tmp_path / "plain"), "--verify"]) == 0
    to_hf(tmp_path / "plain", tmp_path / "base", tmp_path / "out")
    model.save_pretrained(tmp_path / "library")
    assert settings(tmp_path / "out") == settings(tmp_path / "library")
    assert GenerationConfig.from_pretrained(tmp_path / "out").temperature == 0.5


def test_watch_says_once_what_it_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = llama(rope_parameters=LINEAR)
    llama().save_pretrained(tmp_path / "base")
    hooks = Hooks(ShardedSave(tmp_path / "run", model=model, when=every(1)))
    for step in (1, 2):
        hooks.step(step)
    hooks.close()
    command = ["watch", str(tmp_path / "run"), "--output-dir", str(tmp_path / "out"), "--once"]
    assert main([*command, "--base-model", str(tmp_path / "base")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("step-") == 2
    assert said.count("config.json: rope_parameters") == 1
