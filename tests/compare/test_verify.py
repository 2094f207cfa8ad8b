from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

from shardsmith.cli import main
from shardsmith.compare.verification import Verification, VerifyOptions, verify
from tests.dcp_directories import edit_index, save, save_sharded
from tests.diagnosed_models import FAMILIES, Specimen
from tests.trained_runs import SIZES, Trained

Runs = dict[tuple[str, int], Trained]


@pytest.fixture
def olmo(specimens: dict[str, Specimen]) -> Specimen:
    return specimens["olmo2"]


@pytest.fixture
def sharded(olmo: Specimen, tmp_path: Path) -> Path:
    return save_sharded(olmo.state, tmp_path / "sharded", 3)


def named(verification: Verification) -> dict[str, str]:
    return {found.name: found.problem for model in verification.models for found in model.differences}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("ranks", "dim", "nested", "wrapper"), [(1, 0, None, ""), (8, 1, "model", "_orig_mod.")])
def test_one_model_in_two_formats_is_the_same(
    family: str,
    ranks: int,
    dim: int,
    nested: str | None,
    wrapper: str,
    specimens: dict[str, Specimen],
    tmp_path: Path,
) -> None:
    specimen = specimens[family]
    state = {wrapper + name: tensor for name, tensor in specimen.state.items()}
    checkpoint = save_sharded(state, tmp_path / "c", ranks, dim=dim, nested=nested)
    for pair in ((checkpoint, specimen.base), (specimen.base, checkpoint)):
        for by in ("values", "digests"):
            assert verify(*pair, VerifyOptions(by=by)).same


def test_two_shardings_of_one_run_are_the_same_by_value_and_by_recorded_digests(trained: Runs) -> None:
    checkpoint = trained["llama", 2].checkpoint
    found = verify(checkpoint, trained["llama", 2].checkpoint)
    assert [(model.model, model.equal == model.compared) for model in found.models] == [("main", True), ("ema", True)]
    assert verify(checkpoint, trained["llama", 2].plain["nested"], VerifyOptions(by="digests")).same


def test_recorded_digests_are_compared_without_reading_a_tensor(trained: Runs, tmp_path: Path) -> None:
    checkpoint = trained["llama", 2].checkpoint
    emptied = shutil.copytree(checkpoint, tmp_path / "step-3")
    for shard in emptied.glob("*.distcp"):
        size = shard.stat().st_size
        shard.write_bytes(b"")
        with shard.open("r+b") as file:
            file.truncate(size)  # all zeros: any read of it would be an error
    assert verify(checkpoint, emptied, VerifyOptions(by="digests")).same


def test_all_that_differs_is_listed_with_how_far(olmo: Specimen, sharded: Path, tmp_path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in olmo.state.items()}
    state["lm_head.weight"][5, 7] += 0.25
    state["model.norm.weight"][0] = torch.nan
    del state["model.layers.0.mlp.up_proj.weight"]
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"][:90].clone()
    state["head.weight"] = torch.zeros(2, 2)
    found = verify(sharded, save_sharded(state, tmp_path / "other", 2))
    assert named(found) == {
        "model.layers.0.mlp.up_proj.weight": "only in A",
        "head.weight": "only in B",
        "model.embed_tokens.weight": "shape",
        "lm_head.weight": "values",
        "model.norm.weight": "values",
    }
    by_name = {difference.name: difference for difference in found.models[0].differences}
    assert by_name["lm_head.weight"].largest == pytest.approx(0.25)
    assert by_name["lm_head.weight"].differing == 1
    assert by_name["model.norm.weight"].largest == torch.inf


def test_a_tolerance_and_rounding_are_asked_for_by_name(olmo: Specimen, sharded: Path, tmp_path: Path) -> None:
    rounded = {name: tensor.bfloat16() for name, tensor in olmo.state.items()}
    other = save_sharded(rounded, tmp_path / "other", 2)
    assert not verify(sharded, other).same
    assert not verify(sharded, other, VerifyOptions(tolerance=1e-6)).same
    assert verify(sharded, other, VerifyOptions(tolerance=0.02)).same
    assert verify(sharded, other, VerifyOptions(rounding=True)).same
    moved = save_sharded({n: t + 0.1 for n, t in rounded.items()}, tmp_path / "moved", 2)
    assert not verify(sharded, moved, VerifyOptions(rounding=True)).same


def test_an_infinity_in_the_place_of_a_number_is_no_rounding(olmo: Specimen, tmp_path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in olmo.state.items()}
    state["lm_head.weight"][5, 7], state["model.norm.weight"][0] = 1e6, torch.inf
    wide = save_sharded(state, tmp_path / "wide", 2)
    half = save_sharded({name: tensor.half() for name, tensor in state.items()}, tmp_path / "half", 2)
    found = verify(wide, half, VerifyOptions(rounding=True))
    assert named(found) == {"lm_head.weight": "values"}
    state["lm_head.weight"][5, 7] = 6e4
    wide = save_sharded(state, tmp_path / "fits", 2)
    half = save_sharded({name: tensor.half() for name, tensor in state.items()}, tmp_path / "fits-half", 2)
    assert verify(wide, half, VerifyOptions(rounding=True)).same


def test_a_wider_dtype_with_the_same_values_is_the_same(olmo: Specimen, sharded: Path, tmp_path: Path) -> None:
    wide = save_sharded({name: tensor.double() for name, tensor in olmo.state.items()}, tmp_path / "wide", 2)
    (model,) = verify(sharded, wide).models
    assert len(model.converted) == model.compared
    assert set(named(verify(sharded, wide, VerifyOptions(by="digests"))).values()) == {"dtype"}


def test_a_tensor_that_is_tied_may_be_absent_and_one_that_is_not_may_not(
    specimens: dict[str, Specimen], tmp_path: Path
) -> None:
    state = specimens["llama-tied"].state
    both = save_sharded(state, tmp_path / "both", 2)
    once = save_sharded({n: t for n, t in state.items() if n != "lm_head.weight"}, tmp_path / "once", 2)
    found = verify(both, once)
    assert found.same
    assert found.models[0].tied == ("lm_head.weight",)
    broken = save_sharded(state | {"lm_head.weight": torch.zeros(96, 64)}, tmp_path / "broken", 2)
    assert named(verify(broken, once)) == {"lm_head.weight": "only in A"}


def test_the_command_tells_by_its_exit_status(
    olmo: Specimen, sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(sharded), str(olmo.base)]) == 0
    assert "the same model, in every value" in capsys.readouterr().out
    moved = save_sharded(olmo.state | {"model.norm.weight": torch.zeros(64)}, tmp_path / "moved", 2)
    assert main(["verify", str(sharded), str(moved)]) == 1
    assert "model.norm.weight" in capsys.readouterr().out
    assert main(["verify", str(sharded), str(moved), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["same"] is False
    assert main(["verify", str(sharded), str(tmp_path / "none")]) == 2
    assert main(["verify", str(sharded), str(olmo.base), "--models", "ema"]) == 2
    assert "CheckpointNotFoundError" in capsys.readouterr().err


def test_a_hole_is_no_difference_but_an_error(
    olmo: Specimen, sharded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_index(sharded, lambda metadata: metadata.state_dict_metadata["lm_head.weight"].chunks.pop())
    assert main(["verify", str(sharded), str(olmo.base)]) == 2
    assert "IncompleteCheckpointError" in capsys.readouterr().err


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_tell_what_matters(
    family: str, specimens: dict[str, Specimen], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    specimen = specimens[family]
    tiny = {name: tensor + 1e-9 for name, tensor in specimen.state.items()}
    near = save_sharded(tiny, tmp_path / "near", 2)
    assert main(["verify", str(near), str(specimen.base)]) == 1
    assert main(["verify", str(near), str(specimen.base), "--logits"]) == 0
    far = save_sharded(specimen.state | {"model.norm.weight": torch.ones(64)}, tmp_path / "far", 2)
    assert main(["verify", str(far), str(specimen.base), "--logits", "--json"]) == 1
    capsys.readouterr()
    assert main(["verify", str(near), str(far), "--logits"]) == 2
    assert "--model" in capsys.readouterr().err
    assert main(["verify", str(near), str(near), "--logits", "--model", str(specimen.base)]) == 0


def test_safetensors_files_are_compared_too(olmo: Specimen, sharded: Path, tmp_path: Path) -> None:
    state = load_file(olmo.base / "model.safetensors")
    save_file(state, tmp_path / "one.safetensors")
    assert verify(sharded, tmp_path / "one.safetensors").same


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_is_compared_with_nothing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {f"layers.{i}.weight": torch.randn(8, 8) for i in range(3)}
    other = {name: value + 1 for name, value in state.items()}
    beside = {"model_ema": other, "teacher": other, "ema_of_ours": {"shadow_params": [*other.values()]}}
    dcp.save({"model": state | {"rotary_emb.inv_freq": torch.ones(4)}, **beside}, checkpoint_id=tmp_path / "c")
    save_file(state, tmp_path / "model.safetensors")
    found = verify(tmp_path / "c", tmp_path / "model.safetensors")
    assert found.same
    assert [model.ignored for model in found.models] == [("rotary_emb.inv_freq",)]
    assert [line.split(",")[0].split(":")[0] for line in found.left_out] == ["ema of A", "teacher", "ema_of_ours"]
    assert main(["verify", str(tmp_path / "c"), str(tmp_path / "model.safetensors")]) == 0
    said = capsys.readouterr().out
    assert "the same model, in every value (main)" in said
    assert all(f"not compared: {name}" in said for name in ("ema of A", "teacher", "ema_of_ours"))
    assert verify(tmp_path / "c", tmp_path / "c").left_out  # the teacher, on both sides
    assert not verify(tmp_path / "model.safetensors", tmp_path / "model.safetensors").left_out


def test_stacked_experts_and_separate_ones_are_one_model_for_the_config_that_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))
    model.save_pretrained(tmp_path / "files")  # separate, as the library writes them
    files = load_file(tmp_path / "files" / "model.safetensors")
    (tmp_path / "config").mkdir()
    shutil.copy(tmp_path / "files" / "config.json", tmp_path / "config")
    stacked, separate = save(dict(model.state_dict()), tmp_path / "stacked"), save(files, tmp_path / "separate")
    files["model.layers.1.block_sparse_moe.experts.2.w2.weight"][0, 0] += 1
    other = save(files, tmp_path / "other")
    base = ["--base-model", str(tmp_path / "config")]
    for a, b in ((stacked, separate), (separate, stacked)):
        assert main(["verify", str(a), str(b)]) == 1
        told = capsys.readouterr().out
        assert "not known to be the same model: each has names that the other lacks" in told
        assert "--base-model DIRECTORY" in told
        assert main(["verify", str(a), str(b), "--json"]) == 1
        found = json.loads(capsys.readouterr().out)
        assert (found["same"], found["undecided"]) == (False, True)
        assert main(["verify", str(a), str(b), *base]) == 0  # as it says
    for a, b in ((stacked, other), (other, stacked)):
        assert main(["verify", str(a), str(b), *base, "--json"]) == 1
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["undecided"] is False
        assert main(["verify", str(a), str(b), *base]) == 1
        told = capsys.readouterr().out
        assert "not the same model" in told
        assert "experts.2.w2.weight: values" in told or "layers.1.mlp.experts.down_proj: values" in told
