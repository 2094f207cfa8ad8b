"""Directories like BAGEL's out of checkpoints like BAGEL's; each fault that such converters have had is a test."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from examples.bagel.model import build
from shardsmith import cli
from shardsmith.errors import RankFailedError
from shardsmith.export.joint_plan import plan_together
from shardsmith.export.plan import ExportOptions, choose_stems, plan_directory
from shardsmith.export.write import write_directories
from shardsmith.ground.ranks import Ranks
from shardsmith.tensors.digest import digest_tensor
from tests import dcp_directories
from tests.bagel_base import COPIED, PATCHES, as_conv, fingerprint, initial_weights, make_bagel_base
from tests.legacy_layouts import SIZES, STEP, answers, inputs
from tests.ranks import run_on_ranks

FORK = "fsdp1/write_fork"


@pytest.fixture
def base(tmp_path: Path) -> Iterator[Path]:
    """The base model, which must be the same afterwards, whatever a test does."""
    directory = make_bagel_base(tmp_path / "BAGEL-7B-MoT")
    before = fingerprint(directory)
    yield directory
    assert fingerprint(directory) == before


def to_hf(checkpoint: Path, base: Path, output: Path, *options: str) -> int:
    places = ["--checkpoint_dir", checkpoint, "--output_dir", output, "--base_model_path", base]
    return cli.main(["to-hf", *map(str, places), *options])


def truth(legacy: Path, layout: str) -> dict[str, dict[str, Tensor]]:
    return torch.load(legacy / layout.split("/")[0] / "truth.pt", weights_only=True)


def assert_rounded(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor.bfloat16()) for name, tensor in wanted.items())


def infer(directory: Path, weights: str) -> tuple[Tensor, Tensor]:
    """BAGEL's way: a model on meta, filled from one file by accelerate, nothing made up."""
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch

    with init_empty_weights():
        model = build(SIZES)
    model = load_checkpoint_and_dispatch(model, str(directory / weights), device_map={"": "cpu"}, dtype=torch.float32)
    assert not [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    with torch.no_grad():
        return model(*inputs())


LAYOUTS = [FORK, "hybrid/write_fork_without_dcp", "hybrid/write_bagel"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_main_and_average_are_those_of_the_checkpoint(layout: str, legacy: Path, base: Path, output: Path) -> None:
    # faults: the load does nothing and random weights are exported; the average is never loaded; bf16 is float32
    assert to_hf(legacy / layout, base, output, "--models", "both", "--quiet") == 0
    wanted = truth(legacy, layout)
    for stem in ("model", "ema"):
        assert_rounded(load_file(output / f"{stem}.safetensors"), wanted[stem])
    assert json.loads((output / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_directory_is_complete_and_has_no_stale_index(legacy: Path, base: Path, output: Path) -> None:
    # fault: the base's index, which describes other files, is copied
    assert to_hf(legacy / FORK, base, output, "--quiet") == 0
    made = {"model.safetensors", "ema.safetensors", "shardsmith.json", "README.md"}
    assert {path.name for path in output.iterdir()} == COPIED | made
    assert (output / "ae.safetensors").read_bytes() == (base / "ae.safetensors").read_bytes()
    assert not [path for path in output.rglob("*") if path.is_symlink()]


def test_an_index_describes_the_files_that_are_there(legacy: Path, base: Path, output: Path) -> None:
    assert to_hf(legacy / FORK, base, output, "--max_shard_size", "40kB", "--quiet") == 0
    for stem in ("model", "ema"):
        weight_map = json.loads((output / f"{stem}.safetensors.index.json").read_text())["weight_map"]
        found = {n: file.name for file in output.glob(f"{stem}-*.safetensors") for n in load_file(file)}
        assert found == weight_map
        assert len(set(found.values())) > 1


def test_inference_from_the_directory_is_that_of_the_trained_model(legacy: Path, base: Path, output: Path) -> None:
    assert to_hf(legacy / FORK, base, output, "--dtype", "original", "--quiet") == 0
    wanted = truth(legacy, FORK)
    for stem in ("model", "ema"):
        found, expected = infer(output, f"{stem}.safetensors"), answers(wanted[stem])
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_average_alone_goes_where_inference_looks_for_it(legacy: Path, base: Path, output: Path) -> None:
    assert to_hf(legacy / FORK, base, output, "--models", "ema", "--quiet") == 0
    assert_rounded(load_file(output / "ema.safetensors"), truth(legacy, FORK)["ema"])
    assert not (output / "model.safetensors").exists()


def save_plain(directory: Path, weights: dict[str, Tensor], average: dict[str, Tensor] | None = None) -> Path:
    """A step of the fork, of these weights, written by one process."""
    directory.mkdir()
    facts = {"train_steps": STEP, "world_size": 1, "checkpoint_type": "sharded", "has_ema": average is not None}
    (directory / "metadata.json").write_text(json.dumps(facts))
    for name, state in (("model", weights), ("ema", average)):
        if state is not None:
            dcp_directories.save(dict(state), directory / f"{name}_sharded")
    return directory


def assert_refused(capsys: pytest.CaptureFixture[str], code: int, output: Path, *says: str) -> None:
    assert code == 2
    printed = capsys.readouterr().err
    for text in says:
        assert text in printed
    assert not os.path.lexists(output)


def test_a_layer_too_many_is_refused_with_all_its_tensors(
    base: Path, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # fault: the tower is rebuilt from vit_config.json, which counts one layer more, and 16 tensors are random
    weights = initial_weights()
    last = "vit_model.vision_model.encoder.layers.1."
    weights |= {name.replace("layers.1.", "layers.2."): t for name, t in weights.items() if name.startswith(last)}
    checkpoint = save_plain(tmp_path / "0000006", weights)
    code = to_hf(checkpoint, base, output)
    assert_refused(capsys, code, output, "16 tensors are not as in the base model", "layers.2.layer_norm1.bias: in the")


@pytest.mark.parametrize("missing", ["language_model.model.layers.1.self_attn.q_norm_moe_gen.weight", PATCHES])
def test_a_tensor_too_few_is_refused_by_name(
    missing: str, base: Path, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # fault: counts are printed and never compared; what is missing stays on meta when the directory is loaded
    weights = initial_weights()
    del weights[missing]
    checkpoint = save_plain(tmp_path / "0000006", weights)
    assert_refused(capsys, to_hf(checkpoint, base, output), output, f"{missing}: in the base model, not in the check")


def test_a_manifest_without_shards_is_refused(
    legacy: Path, base: Path, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # fault: metadata.json is written before the shards, and nothing marks a checkpoint as complete
    checkpoint = shutil.copytree(legacy / FORK, tmp_path / "0000006")
    shutil.rmtree(checkpoint / "ema_sharded")
    assert_refused(capsys, to_hf(checkpoint, base, output), output, "ema: neither ema_sharded nor files")


def test_an_average_that_equals_main_in_the_checkpoint_is_said_so(
    base: Path, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = initial_weights()
    checkpoint = save_plain(tmp_path / "0000006", weights, weights)
    assert to_hf(checkpoint, base, output, "--json") == 0
    (made,) = json.loads(capsys.readouterr().out)["directories"]
    average = made["models"][1]
    assert average["same_as_main"] == len(weights)
    assert average["remark"].startswith("is equal to main in the checkpoint itself")


def test_an_average_that_equals_main_once_it_is_rounded_is_told_apart(
    base: Path, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = {name: tensor.bfloat16().float() for name, tensor in initial_weights().items()}
    near = {name: tensor * (1 + 1e-5) for name, tensor in weights.items()}
    assert to_hf(save_plain(tmp_path / "0000006", weights, near), base, output) == 0
    assert "ema: is equal to main once it is rounded; in the checkpoint it is not" in capsys.readouterr().out


def test_the_summary_says_what_was_verified(
    legacy: Path, base: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert to_hf(legacy / FORK, base, output, "--verify", "--json") == 0
    (made,) = json.loads(capsys.readouterr().out)["directories"]
    assert made["template"] == "ema.safetensors"
    for model in made["models"]:
        assert (model["tensors"], model["compared"], model["read_back"]) == (111, 111, True)
        assert model["dtypes"] == {"bfloat16": model["elements"]}
        assert model["orders"] == {PATCHES: "as in the base"}
        assert model["remark"] is None
    assert made["models"][1]["same_as_main"] == 2  # the fixed position embeddings


def test_what_is_as_after_an_initialisation_is_named(
    base: Path, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = initial_weights() | {"llm2vae.weight": torch.zeros(SIZES.latent_dim, SIZES.hidden)}
    assert to_hf(save_plain(tmp_path / "0000006", weights), base, output, "--json") == 0
    (made,) = json.loads(capsys.readouterr().out)["directories"]
    untouched = set(made["models"][0]["constant"])
    assert "llm2vae.weight" in untouched
    assert "language_model.model.norm.weight" in untouched  # all ones
    assert not any("proj.weight" in name for name in untouched)


def test_a_patch_embedding_that_is_still_a_convolution_is_converted(
    base: Path, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = initial_weights()
    checkpoint = save_plain(tmp_path / "0000006", weights | {PATCHES: as_conv(weights[PATCHES])})
    assert to_hf(checkpoint, base, output, "--json") == 0
    (made,) = json.loads(capsys.readouterr().out)["directories"]
    assert made["models"][0]["rules"] == {PATCHES: "conv2d_to_linear"}
    assert made["models"][0]["orders"] == {PATCHES: "as in the base"}
    assert_rounded(load_file(output / "model.safetensors"), weights)


def test_and_back_where_the_base_has_a_convolution(tmp_path: Path, output: Path) -> None:
    weights = initial_weights()
    base = make_bagel_base(tmp_path / "base", weights | {PATCHES: as_conv(weights[PATCHES])})
    assert to_hf(save_plain(tmp_path / "0000006", weights), base, output, "--quiet") == 0
    assert torch.equal(load_file(output / "model.safetensors")[PATCHES], as_conv(weights[PATCHES]).bfloat16())


def test_a_convolution_that_was_reshaped_without_being_permuted_is_found_by_its_values(
    base: Path, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = initial_weights()
    wrong = as_conv(weights[PATCHES]).reshape(weights[PATCHES].shape)  # the right shape
    checkpoint = save_plain(tmp_path / "0000006", weights | {PATCHES: wrong})
    says = "nearer to the base model's weights with its channels first"
    assert_refused(capsys, to_hf(checkpoint, base, output), output, "values are in another order", says)
    assert to_hf(checkpoint, base, output, "--allow", "*patch_embedding.weight", "--quiet") == 0


def test_weights_that_do_not_descend_from_the_base_are_undecided(
    base: Path, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = initial_weights() | {PATCHES: torch.randn(SIZES.vit_hidden, 3 * SIZES.patch**2)}
    assert to_hf(save_plain(tmp_path / "0000006", weights), base, output, "--json") == 0
    (made,) = json.loads(capsys.readouterr().out)["directories"]
    assert made["models"][0]["orders"] == {PATCHES: "undecided"}


RULES = {
    "rules.toml": '[[rule]]\npattern = "llm2vae.weight"\ntransform = "transpose"\n',
    "rules.json": '{"rule": [{"pattern": "llm2vae.*", "steps": [{"permute": [1, 0]}]}]}',
}


@pytest.mark.parametrize("name", RULES)
def test_more_layout_rules_come_from_a_file(
    name: str, base: Path, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = initial_weights()
    turned = weights | {"llm2vae.weight": weights["llm2vae.weight"].t().contiguous()}
    checkpoint = save_plain(tmp_path / "0000006", turned)
    assert_refused(
        capsys, to_hf(checkpoint, base, output), output, "llm2vae.weight: (28, 8) in the checkpoint, (8, 28)"
    )
    (tmp_path / name).write_text(RULES[name])
    assert to_hf(checkpoint, base, output, "--rules", str(tmp_path / name), "--quiet") == 0
    assert_rounded(load_file(output / "model.safetensors"), weights)


@pytest.mark.parametrize(
    "content", ["[[rule]]\npattern = 3\n", "rule = 4", "[[rule]]\npattern = 'a'\ntransform = 'x'\n"]
)
def test_a_file_that_holds_no_rules_is_refused(
    content: str, legacy: Path, base: Path, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rules.toml").write_text(content)
    code = to_hf(legacy / FORK, base, output, "--rules", str(tmp_path / "rules.toml"))
    assert_refused(capsys, code, output, "rules.toml: holds no layout rules")


def test_a_base_whose_weights_cannot_be_read_is_no_base_to_compare_with(
    legacy: Path, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_bagel_base(tmp_path / "base")
    os.truncate(base / "ema.safetensors", 3000)
    assert_refused(capsys, to_hf(legacy / FORK, base, output), output, "ema.safetensors")


def test_a_base_without_weights_is_said_to_have_none(
    legacy: Path, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_bagel_base(tmp_path / "base")
    (base / "ema.safetensors").unlink()
    assert to_hf(legacy / FORK, base, output, "--dry_run") == 0
    says = (
        "names and shapes compared with the base model: model.safetensors.index.json is about files that are not there"
    )
    assert says in capsys.readouterr().out


def hard_link(base: Path, root: Path) -> Path:
    (root / "out").mkdir()
    os.link(base / "ema.safetensors", root / "out" / "ema.safetensors")
    return root / "out"


PLACES: dict[str, Callable[[Path, Path], Path]] = {
    "the base": lambda base, _: base,
    "inside": lambda base, _: base / "out",
    "deep inside": lambda base, _: base / "a" / "b",
    "above": lambda base, _: base.parent,
    "by dots": lambda base, root: root / "x" / ".." / base.name / "out",
    "by a link": lambda base, root: ((root / "link").symlink_to(base), root / "link" / "out")[1],
    "a link to it": lambda base, root: ((root / "out").symlink_to(base), root / "out")[1],
    "hard links": hard_link,
}


@pytest.mark.parametrize("place", PLACES)
def test_an_output_that_could_touch_the_base_is_refused(
    place: str, legacy: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # fault: nothing keeps output and base apart. That the base stays as it is, is what its fixture looks at
    (tmp_path / "x").mkdir()
    output = PLACES[place](base, tmp_path)
    assert to_hf(legacy / FORK, base, output) == 2
    assert capsys.readouterr().err.startswith(("shardsmith: ProtectedPathError", "shardsmith: TargetExistsError"))


def run_export(checkpoint: Path, base: Path, output: Path, options: dict[str, Any]) -> None:
    """What the command does under torchrun, on ranks of the tests."""
    team = Ranks(20)

    def plans() -> list[Any]:
        stems = choose_stems(checkpoint, base, "both", "auto")
        return [plan_directory(checkpoint, output, base, stem, ExportOptions(**options)) for _, stem in stems]

    checks = write_directories(plan_together(team, plans), team=team, threads=1)
    assert len(checks) == (1 if dist.get_rank() == 0 else 0)


@pytest.mark.parametrize("layout", ["fsdp1/write_fork_without_dcp"])
def test_four_ranks_make_the_same_bytes_as_one_process(
    layout: str, legacy: Path, base: Path, tmp_path: Path, output: Path
) -> None:
    options = {"max_shard_size": "60kB"}
    run_on_ranks(run_export, 4, tmp_path, legacy / layout, base, output, options)
    alone = output.with_name("alone")
    assert to_hf(legacy / layout, base, alone, "--max_shard_size", "60kB", "--quiet") == 0
    assert {path.name for path in output.iterdir()} == {path.name for path in alone.iterdir()}
    for path in alone.iterdir():
        if path.name != "shardsmith.json":  # says when it was made
            assert (output / path.name).read_bytes() == path.read_bytes(), path.name
    facts = [json.loads((place / "shardsmith.json").read_text())["models"] for place in (output, alone)]
    assert facts[0] == facts[1]
    written = load_file(next(output.glob("ema-00001-*")))
    digests = facts[0]["ema"]["tensors"]
    assert all(digests[name]["digest"] == str(digest_tensor(tensor)) for name, tensor in written.items())


def run_refused(checkpoint: Path, base: Path, output: Path) -> None:
    # fault: a collective on rank 0 only, and the others wait for ever
    with pytest.raises(RankFailedError, match=r"planning failed on 1 of 4 ranks\n  rank 0: TargetExistsError"):
        run_export(checkpoint, base, output, {})


def test_what_rank_0_refuses_ends_all_ranks(legacy: Path, base: Path, tmp_path: Path, output: Path) -> None:
    output.mkdir()
    run_on_ranks(run_refused, 4, tmp_path, legacy / FORK, base, output)


def run_damaged(checkpoint: Path, base: Path, output: Path) -> None:
    with pytest.raises(RankFailedError, match="hold different values of it"):
        run_export(checkpoint, base, output, {})


def test_what_one_rank_finds_wrong_ends_all_and_leaves_nothing(
    legacy: Path, base: Path, tmp_path: Path, output: Path
) -> None:
    checkpoint = shutil.copytree(legacy / "hybrid/write_fork_without_dcp", tmp_path / "0000006")
    values = bytearray((checkpoint / "model_rank00003.pt").read_bytes())
    values[len(values) // 2] ^= 1
    (checkpoint / "model_rank00003.pt").write_bytes(values)
    run_on_ranks(run_damaged, 4, tmp_path, checkpoint, base, output)
    assert os.listdir(output.parent) == []


def test_what_is_not_what_was_written_never_appears(
    legacy: Path, base: Path, output: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite

    def bent(descriptor: int, memory: Any, offset: int) -> int:
        data = bytearray(memory)
        if len(data) == 2 * SIZES.hidden * SIZES.inner:  # one of the larger matrices
            data[7] ^= 1
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", bent)
    code = to_hf(legacy / FORK, base, output)
    assert_refused(
        capsys, code, output, "tensors are not what was written; nothing became visible", "mlp.up_proj.weight"
    )


def test_weights_beside_the_model_are_copied_also_from_a_hub_cache(legacy: Path, base: Path, output: Path) -> None:
    snapshot = base.parent / "models--org--bagel" / "snapshots" / "0123"
    blobs = shutil.copytree(base, snapshot.parent.parent / "blobs")
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(os.path.relpath(path, snapshot))
    assert to_hf(legacy / FORK, snapshot, output, "--quiet") == 0
    shutil.rmtree(snapshot.parent.parent)
    assert {path.name for path in output.iterdir() if path.is_file() and not path.is_symlink()} >= COPIED
    assert load_file(output / "ae.safetensors")["decoder.conv_in.weight"].shape == (3, 4)
    save_file(load_file(output / "ema.safetensors"), output / "again.safetensors")
