from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import GPT2Config, GPT2LMHeadModel

from shardsmith.cli import main
from shardsmith.conversion import write_plan
from shardsmith.conversion.heads import make_head
from shardsmith.formats.dcp.source import DcpSource
from shardsmith.ground.commit import sweep
from shardsmith.manifest.initial import config_hash
from shardsmith.manifest.metadata import read_metadata
from shardsmith.tensors.digest import digest_tensor
from tests.dcp_directories import load
from tests.forked import run_python
from tests.ranks import run_on_ranks
from tests.tensor_cases import raw_bytes
from tests.trained_runs import SIZES

KINDS = ("olmo2", "tied", "experts")


def config_of(kind: str) -> Any:
    import transformers

    if kind == "experts":
        experts = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 18}
        return transformers.Qwen3MoeConfig(**SIZES, **experts, architectures=["Qwen3MoeForCausalLM"])
    ends = {"pad_token_id": 0, "eos_token_id": 1}
    if kind == "tied":
        return transformers.LlamaConfig(**SIZES, tie_word_embeddings=True, architectures=["LlamaForCausalLM"])
    return transformers.Olmo2Config(**SIZES, **ends, architectures=["Olmo2ForCausalLM"])


def fresh(kind: str, seed: int = 0) -> nn.Module:
    import transformers

    torch.manual_seed(seed)
    config = config_of(kind)
    model = getattr(transformers, config.architectures[0])(config).bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kind / Hugging Face directory in one file; kind-parts in several. Read only."""
    root = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        fresh(kind).save_pretrained(root / kind)
        (root / kind / "tokenizer.json").write_text(kind)
        fresh(kind).save_pretrained(root / f"{kind}-parts", max_shard_size="20KB")
    return root


def to_dcp(model: Path | str, checkpoint: Path, *options: str) -> Path:
    assert main(["to-dcp", "--model", str(model), "--checkpoint", str(checkpoint), "--quiet", *options]) == 0
    return checkpoint


def tensors_of(checkpoint: Path) -> dict[str, Tensor]:
    """As torch reads them."""
    source = DcpSource(checkpoint)
    state = {key: torch.zeros(spec.shape, dtype=spec.dtype) for key, spec in source.specs.items()}
    return load(state, checkpoint)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert raw_bytes(found[name]) == raw_bytes(tensor), name


@pytest.mark.parametrize("files", ["", "-parts"], ids=["one file", "several files"])
@pytest.mark.parametrize("kind", KINDS)
def test_dcp_load_of_torch_fills_the_state_dict_of_the_model(kind: str, files: str, models: Path, output: Path) -> None:
    to_dcp(models / f"{kind}{files}", output)
    model, expected = fresh(kind, seed=1), fresh(kind).state_dict()
    state = load(model.state_dict(), output)  # asks for tied names twice
    assert_same(state, expected)
    assert_same(tensors_of(output), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_to_hf_gives_the_tensors_back_byte_for_byte(kind: str, models: Path, output: Path, tmp_path: Path) -> None:
    to_dcp(models / f"{kind}-parts", output)
    places = ["--checkpoint_dir", output, "--output_dir", tmp_path / "hf", "--base_model_path", models / kind]
    assert main(["to-hf", *map(str, places), "--dtype", "original", "--quiet"]) == 0
    assert_same(load_file(tmp_path / "hf" / "model.safetensors"), load_file(models / kind / "model.safetensors"))


def test_the_manifest_says_what_it_was_made_of(models: Path, output: Path) -> None:
    to_dcp(models / "tied", output)
    metadata, model = read_metadata(output), fresh("tied")
    assert (metadata.step, metadata.tied) == (0, {"lm_head.weight": "model.embed_tokens.weight"})
    assert {key: record.digest for key, record in metadata.tensors.items()} == {
        key: str(digest_tensor(value)) for key, value in model.state_dict().items()
    }
    initial = metadata.initial
    assert initial is not None
    assert (initial.source, initial.source_format, initial.model_class) == ("tied", "huggingface", "LlamaForCausalLM")
    assert initial.config is not None
    assert initial.config["rope_parameters"]["rope_theta"] == 10000.0
    assert initial.config_xxh3_128 == config_hash(initial.config)
    assert initial.tokenizer.keys() == {"tokenizer.json"}
    rotary = initial.buffers["model.rotary_emb.inv_freq"].tensor()
    assert rotary is not None
    assert raw_bytes(rotary) == raw_bytes(type(model)(config_of("tied")).model.rotary_emb.inv_freq)
    assert (initial.heads, initial.seed, initial.cast_to) == ({}, None, None)


def test_tied_tensors_are_stored_once(models: Path, output: Path) -> None:
    places = DcpSource(to_dcp(models / "tied", output)).index.tensors
    assert places["lm_head.weight"].chunks == places["model.embed_tokens.weight"].chunks
    stored = sum(path.stat().st_size for path in output.glob("*.distcp"))
    state = fresh("tied").state_dict()
    assert stored < sum(value.nbytes for value in state.values()) + 1024 * len(state)


def test_the_nested_layout_is_that_of_older_trainers(models: Path, output: Path) -> None:
    to_dcp(models / "olmo2", output, "--layout", "nested")
    state = load({"model": fresh("olmo2", seed=1).state_dict()}, output)
    assert_same(state["model"], fresh("olmo2").state_dict())


def test_a_cast_is_that_of_torch_and_recorded(models: Path, output: Path) -> None:
    to_dcp(models / "olmo2", output, "--dtype", "float32")
    assert_same(tensors_of(output), {name: value.float() for name, value in fresh("olmo2").state_dict().items()})
    initial = read_metadata(output).initial
    assert initial is not None
    assert initial.cast_to == "float32"


class MlpOfVersion1(nn.Module):
    """As the first version of the fork of flame has it: the module that has to load what is written."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(hidden)
        self.ffn = nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.Dropout(), nn.Linear(hidden, hidden))


class MlpOfVersion2(nn.Module):
    """As the later version has it."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(hidden)
        self.gate_proj, self.up_proj = (nn.Linear(hidden, 2 * hidden, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(2 * hidden, hidden, bias=False)


class Linear(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.ln, self.proj = nn.LayerNorm(hidden), nn.Linear(hidden, hidden)


class Gated(MlpOfVersion1):
    def __init__(self, hidden: int) -> None:
        super().__init__(hidden)
        self.gate = nn.Linear(hidden, hidden)


HEADS: dict[str, tuple[list[str], Callable[[int], nn.Module]]] = {
    "linear": (["linear"], Linear),
    "mlp": (["mlp"], MlpOfVersion1),
    "mlp of version 2": (["mlp", "--future_predictor_version", "2"], MlpOfVersion2),
    "gated": (["gated"], Gated),
}


@pytest.mark.parametrize("kind", ["olmo2", "experts"])
def test_a_dtype_without_room_for_the_values_is_refused(
    kind: str, models: Path, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = shutil.copytree(models / kind, tmp_path / "wide")
    held = load_file(wide / "model.safetensors")
    held["model.norm.weight"][3], held["lm_head.weight"][5, 1] = -1e6, 7e4
    save_file(held, wide / "model.safetensors", {"format": "pt"})
    command = ["to-dcp", "--base-model", str(wide), "--output-dir", str(output), "--quiet"]
    assert main([*command, "--dtype", "float16"]) == 2
    told = capsys.readouterr().err
    assert "2 tensors have finite values that would be infinite" in told
    assert "lm_head.weight: up to 70144\n  model.norm.weight: up to 999424\n" in told, "as bfloat16 has them"
    assert os.listdir(output.parent) == []
    assert main([*command, "--dtype", "original"]) == 0  # as it says


@pytest.mark.parametrize("head", HEADS)
def test_a_future_predictor_lies_beside_the_model_and_is_seeded(
    head: str, models: Path, output: Path, tmp_path: Path
) -> None:
    flags, make = HEADS[head]
    options = ["--include-future-predictor", "--future-predictor-head-type", *flags]
    found = tensors_of(to_dcp(models / "olmo2", output, *options))
    hidden = found["model.norm.weight"].shape[0]
    keys = found.keys() - fresh("olmo2").state_dict().keys()
    make(hidden).load_state_dict({key: found[key] for key in keys})  # strict: names and shapes are those of the trainer
    assert all(value.dtype == torch.bfloat16 for value in found.values())
    again = tensors_of(to_dcp(models / "olmo2", tmp_path / "again", *options))
    other = tensors_of(to_dcp(models / "olmo2", tmp_path / "other", *options, "--seed", "1"))
    matrix = next(key for key in sorted(keys) if found[key].dim() > 1)
    assert torch.equal(found[matrix], again[matrix])
    assert not torch.equal(found[matrix], other[matrix])
    places = ["--checkpoint_dir", output, "--output_dir", tmp_path / "hf", "--base_model_path", models / "olmo2"]
    assert main(["to-hf", *map(str, places), "--dtype", "original", "--quiet"]) == 0  # the heads are recorded
    assert_same(load_file(tmp_path / "hf" / "model.safetensors"), load_file(models / "olmo2" / "model.safetensors"))


def test_random_numbers_of_a_head_depend_on_its_name_and_seed_and_leave_all_others_as_they_were() -> None:
    def accelerators() -> object:
        """What is drawn there next: the generators, or the seeds that wait for a device to be used first."""
        if torch.cuda.is_initialized():
            return [state.tolist() for state in torch.cuda.get_rng_state_all()]
        return list(torch.cuda._lazy_seed_tracker.get_calls())

    before = torch.get_rng_state(), accelerators()
    made = {
        key: make_head(key[0], lambda: nn.Linear(5, 5), key[1], None).tensors["weight"]
        for key in [("a", 0), ("b", 0), ("a", 1)]
    }
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == accelerators()
    assert len({tuple(values.flatten().tolist()) for values in made.values()}) == 3
    again = make_head("a", lambda: nn.Linear(5, 5), 0, None)
    assert torch.equal(again.tensors["weight"], made["a", 0])


def test_a_class_that_calls_its_width_otherwise_has_a_head_as_wide(tmp_path: Path, output: Path) -> None:
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=16)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    found = tensors_of(to_dcp(tmp_path / "gpt2", output, "--include-future-predictor"))
    assert found["proj.weight"].shape == (32, 32)


def test_the_version_of_a_head_is_found_from_a_checkpoint_that_has_one(
    models: Path, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mlp = ["--include-future-predictor", "--future-predictor-head-type", "mlp", "--future_predictor_version"]
    first = to_dcp(models / "olmo2", output, *mlp, "2")
    found = tensors_of(to_dcp(models / "olmo2", tmp_path / "again", *mlp, str(first)))
    assert "gate_proj.weight" in found
    down = found["down_proj.weight"].float()
    assert down.std().item() == pytest.approx(0.03 / down.shape[1] ** 0.5, rel=0.1)
    bare = to_dcp(models / "olmo2", tmp_path / "bare")
    for version, words in ((str(bare), "has no head of type mlp"), ("3", "give 1, 2, or a checkpoint")):
        arguments = ["to-dcp", "--model", str(models / "olmo2"), "--checkpoint", str(tmp_path / "no"), *mlp, version]
        assert main(arguments) == 2
        assert words in capsys.readouterr().err


def make_layer(width: int, bias: bool = True) -> nn.Module:
    return nn.ModuleDict({"extra": nn.Linear(width, 2, bias=bias)})


def make_collision() -> nn.Module:
    return nn.ModuleDict({"lm_head": nn.Linear(2, 2)})


def test_the_state_dict_of_any_module_can_be_added(models: Path, output: Path) -> None:
    module = 'tests.conversion.test_to_dcp:make_layer={"width": 5, "bias": false}'
    found = tensors_of(to_dcp(models / "olmo2", output, "--extra_module", module))
    assert found["extra.weight"].shape == (2, 5)
    initial = read_metadata(output).initial
    assert initial is not None
    assert initial.heads == {"make_layer": ("extra.weight",)}


REFUSED = {
    "a key of the model": (
        ["--extra_module", "tests.conversion.test_to_dcp:make_collision"],
        "lm_head.weight: of make_collision",
    ),
    "no such module": (["--extra_module", "no.such:thing"], "ModuleNotFoundError"),
    "arguments that are no JSON": (["--extra_module", "tests.conversion.test_to_dcp:make_layer={x"], "JSONDecodeError"),
    "arguments that do not fit": (["--extra_module", 'tests.conversion.test_to_dcp:make_layer={"x": 1}'], "TypeError"),
    "twice the same": (["--extra_module", *['tests.conversion.test_to_dcp:make_layer={"width": 5}'] * 2], "used twice"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_head_that_cannot_be_is_refused(
    case: str, models: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, reason = REFUSED[case]
    assert main(["to-dcp", "--model", str(models / "olmo2"), "--checkpoint", str(output), *options]) == 2
    assert reason in capsys.readouterr().err
    assert os.listdir(output.parent) == []


def run_conversions(models: Path, output: Path) -> None:
    planned = []
    plan = write_plan._planned
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write_plan, "_planned", lambda *args: planned.append(args) or plan(*args))
        to_dcp(models / "tied-parts", output / "tied")
        to_dcp(models / "tied-parts", output / "nested", "--layout", "nested", "--dtype", "float32")
        assert len(planned) == (2 if dist.get_rank() == 0 else 0), "the others are told"
        to_dcp(models / "experts-parts", output / "experts")
        assert len(planned) == (3 if dist.get_rank() == 0 else 1), "experts are fused, so each makes the model"
    assert dist.is_initialized(), "the group of the caller is left alone"


def test_ranks_share_the_writing_and_make_the_same_checkpoint(models: Path, output: Path, tmp_path: Path) -> None:
    run_on_ranks(run_conversions, 2, tmp_path, models, output)
    for kind in ("tied", "experts"):
        assert {path.name for path in (output / kind).glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}
        assert_same(tensors_of(output / kind), fresh(kind).state_dict())
        alone = read_metadata(to_dcp(models / kind, tmp_path / kind))
        together = read_metadata(output / kind)
        assert (together.tensors, together.world_size) == (alone.tensors, 2)
    nested = {f"model.{name}": value.float() for name, value in fresh("tied").state_dict().items()}
    assert_same(tensors_of(output / "nested"), nested)


def run_failing(model: Path, output: Path) -> None:
    if dist.get_rank() == 1:
        shutil.rmtree(model)  # of this rank alone: the others have opened theirs
    assert main(["to-dcp", "--model", str(model), "--checkpoint", str(output), "--quiet"]) == 2


def test_an_error_on_one_rank_leaves_nothing_behind(models: Path, output: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "olmo2", tmp_path / "model")
    run_on_ranks(run_failing, 2, tmp_path, tmp_path / "model", output)
    assert os.listdir(output.parent) == []


def test_a_directory_that_nothing_knows_keeps_its_names(
    tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {"a.weight": torch.randn(3, 4), "steps": torch.tensor(7), "empty": torch.empty(0, 2)}
    save_file(state, tmp_path / "model.safetensors")
    assert main(["to-dcp", "--model", str(tmp_path / "model.safetensors"), "--checkpoint", str(output)]) == 0
    assert "no model was made to compare them with" in capsys.readouterr().out
    assert_same(tensors_of(output), state)


def test_a_large_tensor_is_cut_into_chunks_that_torch_puts_together(
    tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardsmith.formats.dcp.shard_files.CHUNK_BYTES", 100)
    monkeypatch.setattr("shardsmith.formats.dcp.shard_files._MAPPED_BYTES", 64)
    state = {"a": torch.randn(31, 9), "b": torch.randn(2, 3, 40), "c": torch.arange(77), "d": torch.randn(())}
    save_file(state, tmp_path / "model.safetensors")
    to_dcp(tmp_path / "model.safetensors", output)
    assert len(DcpSource(output).index.tensors["a"].chunks) > 2
    assert_same(tensors_of(output), state)


def run_sharded_load(checkpoint: Path, truth: Path) -> None:
    model = fresh("tied", seed=1)
    fully_shard(model)
    state = model.state_dict()
    dcp.load(state, checkpoint_id=checkpoint)
    expected = torch.load(truth, weights_only=True)
    for name, value in state.items():
        assert torch.equal(value.full_tensor(), expected[name]), name


def test_ranks_load_their_parts_of_a_tensor_that_is_cut_into_chunks(
    models: Path, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardsmith.formats.dcp.shard_files.CHUNK_BYTES", 1000)
    to_dcp(models / "tied", output)
    assert len(DcpSource(output).index.tensors["lm_head.weight"].chunks) > 2
    torch.save(fresh("tied").state_dict(), tmp_path / "truth.pt")
    run_on_ranks(run_sharded_load, 2, tmp_path, output, tmp_path / "truth.pt")


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(
    models: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["to-dcp", "--model", str(models / "tied"), "--checkpoint", str(output), "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "nothing was written" in printed
    assert "lm_head.weight is tied to model.embed_tokens.weight" in printed
    assert os.listdir(output.parent) == []


def test_the_summary_counts_what_the_model_counts(
    models: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["to-dcp", "--model", str(models / "tied"), "--checkpoint", str(output)]) == 0
    rows = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    model = fresh("tied")
    elements = sum(parameter.numel() for parameter in model.parameters())
    counted = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}
    assert counted["model parameters"] == [str(len([*model.parameters()])), f"{elements:,}", f"{elements:,}", "yes"]
    keys = sum(value.numel() for value in model.state_dict().values())
    assert counted["get_model_state_dict"] == [str(len(model.state_dict())), f"{keys:,}", f"{keys:,}", "yes"]
    assert counted["persistent buffers"] == ["0", "0", "0", "yes"]


def cut_a_file(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def lose_a_tensor(model: Path) -> None:
    state = load_file(model / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, model / "model.safetensors")


def add_a_tensor(model: Path) -> None:
    save_file({**load_file(model / "model.safetensors"), "stranger": torch.ones(1)}, model / "model.safetensors")


def resize_a_tensor(model: Path) -> None:
    save_file(
        {**load_file(model / "model.safetensors"), "model.norm.weight": torch.ones(1)}, model / "model.safetensors"
    )


def point_outside(model: Path) -> None:
    (model / "model.safetensors").rename(model.parent / "elsewhere.safetensors")
    (model / "model.safetensors").symlink_to(model.parent / "elsewhere.safetensors")


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | changes))

    return edit


def forget_the_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


DAMAGED = {
    "truncated": (cut_a_file, "IncompleteCheckpointError"),
    "a tensor lost": (lose_a_tensor, "model.norm.weight: in the model (36,), not in the files"),
    "a tensor too many": (add_a_tensor, "stranger: in the files (1,), not in the model"),
    "another shape": (resize_a_tensor, "model.norm.weight: (1,) in the files, (36,) in the model"),
    "another depth": (edit_config(num_hidden_layers=3), "model.layers.2.mlp.down_proj.weight: in the model"),
    "links out": (point_outside, "out of its directory; it was not read"),
    "no weights": (forget_the_weights, "UnsupportedFormatError"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_model_is_a_typed_error(
    case: str, models: Path, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, reason = DAMAGED[case]
    damage(shutil.copytree(models / "olmo2", tmp_path / "model"))
    assert main(["to-dcp", "--model", str(tmp_path / "model"), "--checkpoint", str(output)]) == 2
    assert reason in capsys.readouterr().err
    assert os.listdir(output.parent) == []


def test_code_of_the_model_is_not_run_unasked(models: Path, output: Path, tmp_path: Path) -> None:
    model = shutil.copytree(models / "olmo2", tmp_path / "model")
    edit_config(auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}, model_type="evil")(model)
    (model / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    to_dcp(model, output)  # the names are those of the files then
    assert not (tmp_path / "ran").exists()


def test_files_that_contradict_a_tie_are_refused(
    models: Path, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(models / "tied", tmp_path / "model")
    state = load_file(model / "model.safetensors")
    save_file({**state, "lm_head.weight": state["model.embed_tokens.weight"] + 1}, model / "model.safetensors")
    assert main(["to-dcp", "--model", str(model), "--checkpoint", str(output)]) == 2
    assert "lm_head.weight and model.embed_tokens.weight" in capsys.readouterr().err
    save_file({**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()}, model / "model.safetensors")
    to_dcp(model, output)


def test_what_exists_is_left_as_it_is_and_the_model_is_protected(
    models: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output.mkdir()
    assert main(["to-dcp", "--model", str(models / "olmo2"), "--checkpoint", str(output)]) == 2
    assert "TargetExistsError" in capsys.readouterr().err
    inside = models / "olmo2" / "dcp"
    assert main(["to-dcp", "--model", str(models / "olmo2"), "--checkpoint", str(inside)]) == 2
    assert "ProtectedPathError" in capsys.readouterr().err


def test_a_name_of_the_hub_is_taken_from_the_local_cache(
    models: Path, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--some--olmo"
    revision = "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    shutil.copytree(models / "olmo2", repository / "blobs")
    (repository / "snapshots" / revision).mkdir(parents=True)
    for file in (repository / "blobs").iterdir():
        (repository / "snapshots" / revision / file.name).symlink_to(f"../../blobs/{file.name}")
    to_dcp("some/olmo", output)
    initial = read_metadata(output).initial
    assert initial is not None
    assert initial.source == "some/olmo"
    assert main(["to-dcp", "--model", "no/such", "--checkpoint", str(output)]) == 2
    assert "not in the Hugging Face cache" in capsys.readouterr().err


def test_files_without_the_prefix_of_the_model_are_written_under_its_names(output: Path, tmp_path: Path) -> None:
    model: Any = fresh("tied")
    model.model.save_pretrained(tmp_path / "inner")  # names without "model."
    edit_config(architectures=["LlamaForCausalLM"])(tmp_path / "inner")
    assert "embed_tokens.weight" in load_file(tmp_path / "inner" / "model.safetensors")
    to_dcp(tmp_path / "inner", output)
    assert_same(tensors_of(output), model.state_dict())


def test_a_torch_file_of_the_hub_is_read_without_running_it(models: Path, output: Path, tmp_path: Path) -> None:
    model = shutil.copytree(models / "olmo2", tmp_path / "model")
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    to_dcp(model, output)
    assert_same(tensors_of(output), fresh("olmo2").state_dict())


def test_a_full_disk_is_an_error_and_leaves_nothing(models: Path, output: Path) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"
    arguments = ["to-dcp", "--model", str(models / "olmo2"), "--checkpoint", str(output)]
    program = f"{limit}\nimport sys\nfrom shardsmith.cli import main\nsys.exit(main({arguments!r}))"
    ran = run_python("-c", program)
    assert ran.returncode == 2
    assert "WriteError" in ran.stderr
    assert "File too large" in ran.stderr
    assert os.listdir(output.parent) == []


def test_a_disk_that_fails_while_the_rest_is_written_is_an_error_and_leaves_nothing(
    tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failed: list[int] = []

    def fail_once(descriptor: int) -> None:
        if not failed:  # as Linux does: of one descriptor an error is told once
            failed.append(descriptor)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    save_file({"a": torch.randn(100), "b": torch.randn(100)}, tmp_path / "model.safetensors")
    monkeypatch.setattr(os, "fsync", lambda descriptor: None if is_directory(descriptor) else fail_once(descriptor))
    assert main(["to-dcp", "--model", str(tmp_path / "model.safetensors"), "--checkpoint", str(output)]) == 2
    assert "write failed: Input/output error" in capsys.readouterr().err
    assert os.listdir(output.parent) == []


def is_directory(descriptor: int) -> bool:
    return stat.S_ISDIR(os.fstat(descriptor).st_mode)


def test_a_killed_conversion_leaves_nothing_that_the_next_one_does_not_remove(tmp_path: Path, output: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    save_file({"a": torch.zeros(1 << 26)}, model / "model.safetensors")
    (model / "config.json").write_text("{}")
    command = [sys.executable, "-m", "shardsmith.cli", "to-dcp", "--model", str(model), "--checkpoint", str(output)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not any(path.stat().st_size for path in output.parent.glob(".*/*.distcp")):
        assert process.poll() is None
    process.kill()
    process.wait()
    assert not output.exists()
    (left,) = output.parent.iterdir()
    deadline = time.monotonic() + 60
    while sweep(output.parent) != [left]:  # once the child has noticed that its parent is gone
        assert time.monotonic() < deadline


CUSTOM = """
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

class Config(PreTrainedConfig):
    model_type = "custom"
    def __init__(self, width=3, **kwargs):
        super().__init__(**kwargs)
        self.width = width

class Model(PreTrainedModel):
    config_class = Config
    def __init__(self, config):
        super().__init__(config)
        self.layer = nn.Linear(config.width, 2)
        self.register_buffer("scale", torch.ones(2) / 3, persistent=False)
        self.post_init()
"""


def test_the_models_own_code_is_run_if_that_is_asked_for(tmp_path: Path, output: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "custom.py").write_text(CUSTOM)
    auto = {"AutoConfig": "custom.Config", "AutoModelForCausalLM": "custom.Model"}
    config = {"model_type": "custom", "architectures": ["Model"], "auto_map": auto, "width": 5}
    (model / "config.json").write_text(json.dumps(config))
    save_file({"layer.weight": torch.randn(2, 5), "layer.bias": torch.randn(2)}, model / "model.safetensors")
    to_dcp(model, output, "--trust_remote_code")
    initial = read_metadata(output).initial
    assert initial is not None
    assert initial.model_class == "Model"
    assert initial.buffers["scale"].shape == (2,)


def test_options_that_a_whole_step_would_not_heed_are_refused_by_name(
    models: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = ["--base-model", str(models / "olmo2"), "--output-dir", str(output)]
    assert main(["to-dcp", *places, "--whole", "--dtype", "float32", "--layout", "nested", "--seed", "1"]) == 2
    assert "--dtype, --layout, --seed: not with --whole" in " ".join(capsys.readouterr().err.split())
    assert not output.exists()
