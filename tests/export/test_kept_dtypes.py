"""What a library keeps in float32 when a model is loaded in another dtype is not rounded in exports of that dtype.

The measure is what the library writes after it has loaded the base in that dtype.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from shardsmith.cli import main
from shardsmith.hf.known_class import _find, find_model_class
from shardsmith.hooks import HFExport, Hooks, ShardedSave, every
from shardsmith.tensors.tensors import TensorSpec
from tests.export.test_components import wan
from tests.hf.test_directory_check import saved


def glm() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 64}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
    return transformers.Glm4MoeForCausalLM(transformers.Glm4MoeConfig(**sizes, **heads, **experts))


def blip() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.InstructBlipConfig(
        vision_config={**sizes, "image_size": 16, "patch_size": 8},
        qformer_config={**sizes, "vocab_size": 64, "encoder_hidden_size": 32},
        text_config={"model_type": "llama", **sizes, "vocab_size": 64},
    )
    return transformers.InstructBlipForConditionalGeneration(config)


def xlnet() -> Any:
    """Its attention has tensors that are made in float32, whatever dtype is asked for."""
    config = transformers.XLNetConfig(vocab_size=64, d_model=32, n_layer=1, n_head=4, d_inner=48)
    return transformers.XLNetForTokenClassification(config)


CASES: list[tuple[Callable[[], Any], torch.dtype]] = [
    (glm, torch.bfloat16),
    (glm, torch.float16),
    (blip, torch.bfloat16),  # which keeps tensors in float32 beside float16 only
    (blip, torch.float16),
    (wan, torch.bfloat16),
    (xlnet, torch.bfloat16),
    (xlnet, torch.float16),
]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0].__name__}-{str(case[1])[6:]}")
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, str, dict[str, Tensor]]:
    """A model, saved below ``base`` and by dcp below ``ck``, a dtype, and what the library writes in that dtype."""
    make, dtype = request.param
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn_like(tensor))  # some would be zeros, which nothing rounds
    model.save_pretrained(tmp_path / "base")
    saved(dict(model.state_dict()), tmp_path / "ck")
    type(model).from_pretrained(tmp_path / "base", torch_dtype=dtype).save_pretrained(tmp_path / "library")
    return model, str(dtype)[6:], weights(tmp_path / "library")


def weights(directory: Path) -> dict[str, Tensor]:
    (file,) = directory.glob("*.safetensors")
    return load_file(file)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert {name: value.dtype for name, value in found.items()} == {n: value.dtype for n, value in expected.items()}
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_to_hf_rounds_what_the_library_rounds(case: tuple[Any, str, dict[str, Tensor]], tmp_path: Path) -> None:
    _, dtype, expected = case
    pair = ["--checkpoint", str(tmp_path / "ck"), "--base-model", str(tmp_path / "base")]
    assert main(["to-hf", *pair, "--output-dir", str(tmp_path / "out"), "--dtype", dtype]) == 0
    assert_equal(weights(tmp_path / "out"), expected)
    assert main(["verify", str(tmp_path / "ck"), str(tmp_path / "out"), "--rounding"]) == 0
    assert main(["verify", str(tmp_path / "out")]) == 0


def test_a_run_exports_what_the_library_rounds(case: tuple[Any, str, dict[str, Tensor]], tmp_path: Path) -> None:
    model, dtype, expected = case
    save = ShardedSave(tmp_path / "run", model=model, when=every(1))
    bases: dict[str, Any] = {"base": {"base_model": tmp_path / "base"}, "alone": {}}
    sources: dict[str, Any] = {"live": {}, "checkpoint": {"source": "checkpoint", "checkpoints": save}}
    exports = {
        tmp_path / f"{one}-{other}": HFExport(
            tmp_path / f"{one}-{other}", model=model, when=every(1), dtype=dtype, **bases[one], **sources[other]
        )
        for one in bases
        for other in sources
    }
    hooks = Hooks(save, *exports.values())
    hooks.step(1)
    hooks.close()
    for directory in exports:
        assert_equal(weights(directory / "step-1"), expected)


def test_to_dcp_and_weights_of_saves_round_what_the_library_rounds(
    case: tuple[Any, str, dict[str, Tensor]], tmp_path: Path
) -> None:
    model, dtype, expected = case
    pair = ["--base-model", str(tmp_path / "base"), "--output-dir", str(tmp_path / "seed")]
    if dtype == "bfloat16":
        save = ShardedSave(tmp_path / "run", model=model, when=every(1), weights="huggingface", weights_dtype=dtype)
        hooks = Hooks(save)
        hooks.step(1)
        hooks.close()
        assert_equal(weights(tmp_path / "run" / "step-1"), expected)
    if not isinstance(model, transformers.PreTrainedModel):
        return  # of diffusers to-dcp knows no model
    assert main(["to-dcp", *pair, "--dtype", dtype]) == 0
    back = ["--checkpoint", str(tmp_path / "seed"), "--base-model", str(tmp_path / "base"), "--dtype", "original"]
    assert main(["to-hf", *back, "--output-dir", str(tmp_path / "back")]) == 0
    assert_equal(weights(tmp_path / "back"), expected)


def test_a_pattern_that_names_it_rounds_it(tmp_path: Path) -> None:
    model = glm()
    dtypes = {"*.e_score_correction_bias": "bfloat16", "*": "bfloat16"}
    hooks = Hooks(HFExport(tmp_path, model=model, when=every(1), dtype=dtypes))
    hooks.step(1)
    hooks.close()
    written = weights(tmp_path / "step-1")
    rounded = {name for name, value in written.items() if value.dtype == torch.bfloat16}
    assert [name for name in rounded if name.endswith("e_score_correction_bias")]


def test_a_model_of_no_library_is_rounded_as_a_whole(tmp_path: Path) -> None:
    hooks = Hooks(HFExport(tmp_path, model=nn.Linear(3, 3), when=every(1), dtype="bfloat16"))
    hooks.step(1)
    hooks.close()
    assert {value.dtype for value in weights(tmp_path / "step-1").values()} == {torch.bfloat16}


def test_an_export_says_where_it_is_not_known_what_the_library_keeps(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("loaded in another way")

    model, load = glm(), transformers.Glm4MoeForCausalLM.from_pretrained
    model.save_pretrained(tmp_path / "base")
    saved(dict(model.state_dict()), tmp_path / "ck")
    # As of a class that cannot be loaded without data; the comparison of names is another load, in the default dtype.
    monkeypatch.setattr(
        transformers.Glm4MoeForCausalLM,
        "from_pretrained",
        lambda *given, **options: (load if options["dtype"] == torch.float32 else fail)(*given, **options),
    )
    _find.cache_clear()
    pair = ["--checkpoint", str(tmp_path / "ck"), "--base-model", str(tmp_path / "base")]
    assert main(["to-hf", *pair, "--output-dir", str(tmp_path / "out"), "--json"]) == 0
    ((written,),) = [one["models"] for one in json.loads(capsys.readouterr().out)["directories"]]
    assert "may have been rounded: its loader raises RuntimeError: loaded in another way" in written["float32_unknown"]
    hooks = Hooks(HFExport(tmp_path / "run", model=model, when=every(1)))
    hooks.step(1)
    hooks.close()
    assert len([record for record in caplog.records if "may have been rounded" in record.message]) == 1


def test_names_that_no_map_knows_are_said_to_be_rounded() -> None:
    model = glm()
    found, _ = find_model_class(model.config.to_dict() | {"architectures": ["Glm4MoeForCausalLM"]})
    assert found is not None
    names = {name: TensorSpec(name, tuple(value.shape), value.dtype) for name, value in model.state_dict().items()}
    assert found.kept_from(torch.bfloat16, names).unknown == ""
    other = {f"other.{name}": replace(spec, name=f"other.{name}") for name, spec in names.items()}
    kept = found.kept_from(torch.bfloat16, other)
    assert not kept.names
    assert "e_score_correction_bias and 1 more: the files have them under names" in kept.unknown
