from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from shardsmith.cli import main
from shardsmith.compare.verification import VerifyOptions, verify
from shardsmith.diagnose import Questions, diagnose
from shardsmith.load.load import load_initial
from shardsmith.name_maps.matching import Alignment, match_names
from shardsmith.tensors.tensors import TensorSpec
from tests.dcp_directories import save

MODEL = (
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.{part}.weight" for i in (0, 1) for part in ("q_proj", "norm")),
    "model.norm.weight",
    "lm_head.weight",
)


def specs(names: Collection[str], **sizes: int) -> dict[str, TensorSpec]:
    return {name: TensorSpec(name, (sizes.get(name.replace(".", "_"), 4),), torch.float32) for name in names}


def match(names: Collection[str], target: Collection[str] = MODEL, renames: object = None) -> Alignment:
    return match_names(specs(names), specs(target), renames)


WRAPPINGS: dict[str, Callable[[str], str]] = {
    "torch.compile": "_orig_mod.{}".format,
    "DDP": "module.{}".format,
    "DDP of a compiled one": "module._orig_mod.{}".format,
    "a LightningModule": "model.{}".format,
    "another LightningModule": "net.{}".format,
    "a compiled one in a LightningModule": "model._orig_mod.{}".format,
    "Fabric": "_forward_module.model.{}".format,
    "a policy": "policy.actor.{}".format,
    "FSDP1 all over": lambda name: (
        f"_fsdp_wrapped_module.{name.replace('layers.0.', 'layers.0._fsdp_wrapped_module.')}"
    ),
    "one layer compiled": lambda name: name.replace("layers.0.", "layers.0._orig_mod."),
    "layers checkpointed": lambda name: name.replace(".q_proj", "._checkpoint_wrapped_module.q_proj"),
    "one part in DDP": lambda name: name.replace("model.", "model.module.", 1),
    "peft": lambda name: f"base_model.model.{name.replace('q_proj.', 'q_proj.base_layer.')}",
    "wrapped twice": lambda name: (
        f"module._orig_mod.{name.replace('layers.1.', 'layers.1._checkpoint_wrapped_module.')}"
    ),
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("rest", [(), ("lora.A", "lora.B")])
def test_wrappers_come_off_wherever_they_stand(wrapping: str, rest: tuple[str, ...]) -> None:
    wrap = WRAPPINGS[wrapping]
    found = match([wrap(name) for name in (*MODEL, *rest)])
    assert {name: found.keys[name] for name in MODEL} == {name: wrap(name) for name in MODEL}
    assert len(found.keys) == len(MODEL) + len(rest)
    assert not found.is_plain


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_what_lacks_a_tensor_and_has_another_is_matched_all_the_same(wrapping: str) -> None:
    wrap = WRAPPINGS[wrapping]
    names = [wrap(name) for name in (*MODEL[1:], "value_head.weight")]
    found = match(names)
    assert {name: found.keys[name] for name in MODEL[1:]} == {name: wrap(name) for name in MODEL[1:]}
    assert "value_head.weight" in found.keys


ANY_ORDER = [
    "".join(f"{p}." for p in parts)
    for n in (2, 3)
    for parts in itertools.permutations(["_orig_mod", "module", "model", "_forward_module"], n)
]


@pytest.mark.parametrize("prefix", ANY_ORDER)
def test_a_tied_name_loses_wrappers_in_any_order(prefix: str) -> None:
    """The target does not list it, so nothing but the other names says what stands before it."""
    listed = ["transformer.wte.weight", "transformer.h.0.weight", "transformer.ln_f.weight"]
    found = match([prefix + name for name in (*listed, "lm_head.weight")], listed)
    assert found.keys == {name: prefix + name for name in (*listed, "lm_head.weight")}


def test_a_segment_called_module_stays_where_the_model_has_it() -> None:
    own = ["encoder.module.weight", "encoder.weight", "head.weight"]
    assert match(own, own).is_plain
    wrapped = match([f"module.{name}" for name in own], own)
    assert wrapped.keys == {name: f"module.{name}" for name in own}
    assert wrapped.stripped == wrapped.keys
    assert match(["encoder.module.weight"], []).keys == {"encoder.module.weight": "encoder.module.weight"}


def test_a_prefix_that_fits_a_part_is_not_taken() -> None:
    """A vision tower's names would fit with the prefix, the rest would not."""
    target = ["model.visual.a", "model.visual.b", "model.visual.c", "model.text.d", "lm_head"]
    names = ["visual.a", "visual.b", "visual.c", "model.d", "lm_head"]
    found = match(names, target)
    assert found.is_plain
    assert set(found.keys) == set(names)


def test_a_prefix_that_fits_in_two_ways_is_not_taken() -> None:
    target = ["encoder.block.weight", "decoder.block.weight"]
    assert match(["block.weight"], target).is_plain


def test_a_prefix_that_gives_names_to_tensors_of_other_sizes_is_not_taken() -> None:
    target = {"head.a": TensorSpec("head.a", (7,), torch.float32), "head.b": TensorSpec("head.b", (9,), torch.float32)}
    assert match_names(specs(["a", "b"]), target).is_plain


def test_bare_names_get_the_prefix_that_they_lack() -> None:
    found = match(["layers.0.q_proj.weight", "norm.weight", "lm_head.weight"])
    assert found.keys["model.norm.weight"] == "norm.weight"
    assert (found.added, found.removed) == ("model.", "")


def test_renames_of_the_class_come_before_a_guess() -> None:
    """Both would explain all names; what the class says is right."""

    class Renames:
        def in_memory(self, names: Collection[str]) -> dict[str, str]:
            return {name: name if name.startswith("decoder.") else f"decoder.{name}" for name in names}

    target = ["encoder.x", "decoder.x"]
    assert match(["x"], target, Renames()).keys == {"decoder.x": "x"}
    assert match(["module.x"], target, Renames()).keys == {"decoder.x": "module.x"}
    assert match(["policy.x"], target, Renames()).keys == {"decoder.x": "policy.x"}


def test_what_the_target_does_not_list_is_called_as_the_class_calls_it() -> None:
    """As Whisper's head, tied and in no file, below a LightningModule whose attribute is called like the class's."""

    class Renames:
        def in_memory(self, names: Collection[str]) -> dict[str, str]:
            own = {"model.proj_out.weight": "proj_out.weight"}
            return {name: own.get(name, name.replace("model.model.", "model.")) for name in names}

    target = ["model.encoder.x", "model.decoder.x"]
    found = match([f"model.module.{name}" for name in (*target, "proj_out.weight")], target, Renames())
    assert found.keys == {name: f"model.module.{name}" for name in (*target, "proj_out.weight")}


def test_aliases_get_their_new_names_and_decide_nothing() -> None:
    found = match_names(specs(["m.model.a", "m.model.b"]), specs(["model.a", "model.b"]), None, ["m.lm_head"])
    assert found.aliases == {"lm_head": "m.lm_head"}


def qwen_vl() -> transformers.PreTrainedModel:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "vocab_size": 100, "rope_parameters": rope, "tie_word_embeddings": False}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
    tokens = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    text |= {"bos_token_id": 1, "eos_token_id": 2}
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision | {"patch_size": 4}, tie_word_embeddings=False, **tokens
    )
    torch.manual_seed(0)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def llava() -> transformers.PreTrainedModel:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**sizes, vocab_size=64),
        vision_config=transformers.CLIPVisionConfig(**sizes, image_size=8, patch_size=4),
        image_token_index=60,
    )
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config)


def mixtral() -> transformers.PreTrainedModel:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=3, vocab_size=64)
    return transformers.MixtralForCausalLM(config)


GENERATIONS: dict[str, tuple[Callable[[], transformers.PreTrainedModel], Mapping[str, str]]] = {
    "qwen2.5-vl": (qwen_vl, {"model.visual.": "visual.", "model.language_model.": "model."}),
    "llava": (
        llava,
        {
            "model.language_model.": "language_model.model.",
            "model.vision_tower.": "vision_tower.",
            "model.multi_modal_projector.": "multi_modal_projector.",
            "lm_head.": "language_model.lm_head.",
        },
    ),
    "mixtral": (mixtral, {}),
}


@pytest.mark.parametrize("wrapper", ["", "module.", "policy."])
@pytest.mark.parametrize("kind", GENERATIONS)
def test_names_of_each_generation_are_one_model(kind: str, wrapper: str, tmp_path: Path) -> None:
    make, older = GENERATIONS[kind]
    model = make()
    bases = {"files": tmp_path / "files", "memory": tmp_path / "memory"}
    model.save_pretrained(bases["files"])
    model.save_pretrained(bases["memory"], save_original_format=False)
    live = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    checkpoints = {"memory": live, "older": {renamed(name, older): tensor for name, tensor in live.items()}}
    for name, state in checkpoints.items():
        checkpoint = save({wrapper + key: tensor for key, tensor in state.items()}, tmp_path / f"{name}-checkpoint")
        for base in bases.values():
            assert diagnose(checkpoint, base, Questions(level="values")).faults == ()
            for by in ("values", "digests"):
                assert verify(checkpoint, base, VerifyOptions(by=by)).same
                assert verify(base, checkpoint, VerifyOptions(by=by)).same
    assert verify(bases["files"], bases["memory"]).same


def renamed(name: str, prefixes: Mapping[str, str]) -> str:
    new = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
    return prefixes.get(new, "") + name.removeprefix(new)


@pytest.mark.parametrize("wrapper", ["module._orig_mod.", "policy."])
@pytest.mark.parametrize("kind", ["qwen2.5-vl", "llava"])
def test_an_initial_load_and_an_export_take_the_same_names_off(kind: str, wrapper: str, tmp_path: Path) -> None:
    make, older = GENERATIONS[kind]
    model = make()
    state = {wrapper + renamed(name, older): tensor for name, tensor in changed(model.state_dict()).items()}
    checkpoint = save(state, tmp_path / "checkpoint")
    model.save_pretrained(tmp_path / "base", save_original_format=False)
    (tmp_path / "bare").mkdir()
    shutil.copy(tmp_path / "base" / "config.json", tmp_path / "bare")
    expected = changed(model.state_dict())
    load_initial(checkpoint, model=model, config=tmp_path / "base")
    assert all(torch.equal(expected[name], tensor) for name, tensor in model.state_dict().items())
    for base in ("base", "bare"):
        out = tmp_path / f"out-{base}"
        command = ["to-hf", "--checkpoint_dir", checkpoint, "--base_model_path", tmp_path / base, "--output_dir", out]
        assert main([*map(str, command), "--dtype", "original"]) == 0
        loaded = type(model).from_pretrained(out)
        assert all(torch.equal(expected[name], tensor) for name, tensor in loaded.state_dict().items())


def changed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor + 0.01 for name, tensor in state.items()}


@pytest.mark.parametrize("kind", ["qwen2.5-vl", "llava"])
def test_two_generations_without_a_config_are_the_same_by_their_bytes(kind: str, tmp_path: Path) -> None:
    make, older = GENERATIONS[kind]
    live = {name: tensor.clone() for name, tensor in make().state_dict().items()}
    old = {renamed(name, older): tensor for name, tensor in live.items()}
    new = save(live, tmp_path / "new")
    found = verify(save(old, tmp_path / "old"), new)
    assert found.same
    assert len(found.models[0].renamed) + sum(name in live for name in old) == len(live)
    last = next(reversed(old))
    assert not verify(save(old | {last: old[last] + 1}, tmp_path / "other"), new).same


def test_another_model_under_older_names_is_not_the_same(tmp_path: Path) -> None:
    model = qwen_vl()
    model.save_pretrained(tmp_path / "base")
    older = GENERATIONS["qwen2.5-vl"][1]
    state = {renamed(name, older): tensor for name, tensor in changed(model.state_dict()).items()}
    found = verify(save(state, tmp_path / "checkpoint"), tmp_path / "base")
    assert len(found.models[0].differences) == len(state)
    assert {difference.problem for difference in found.models[0].differences} == {"values"}
