from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shardsmith.cli import main
from shardsmith.hf.hf_directory import config_for
from shardsmith.tensors.digest import digest_tensor
from tests.tensor_cases import raw_bytes
from tests.trained_runs import STEP, Trained, loaded_logits, logits_of

Runs = dict[tuple[str, int], Trained]

ALIASES = {"lm_head.weight"}
"""Of the one model here that ties its embeddings."""
COPIED = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "assets/notes.txt",
    "ae.safetensors",
}
"""What an export takes from the bases of ``make_base``."""

BF16 = torch.bfloat16


def to_hf(checkpoint: Path, base: Path, output: Path, *options: str) -> Path:
    places = ["--checkpoint_dir", checkpoint, "--output_dir", output, "--base_model_path", base]
    assert main(["to-hf", *map(str, places), "--quiet", *options]) == 0
    return output


def listing(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Bit for bit, with floating-point tensors cast as ``Tensor.to`` does."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        wanted = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
        assert (found[name].dtype, found[name].shape) == (wanted.dtype, wanted.shape), name
        assert raw_bytes(found[name]) == raw_bytes(wanted), name


def without_aliases(kind: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if kind != "qwen2" or name not in ALIASES}


@pytest.mark.parametrize("dtype", ["original", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("kind", "ranks"), [("llama", 2), ("qwen2", 1), ("qwen2", 2), ("odd", 1), ("odd", 2), ("odd", 4)]
)
def test_every_tensor_is_that_of_the_live_model(kind: str, ranks: int, dtype: str, trained: Runs, output: Path) -> None:
    run = trained[kind, ranks]
    to_hf(run.checkpoint, run.base, output, "--dtype", dtype)
    cast = None if dtype == "original" else getattr(torch, dtype)
    assert_same(load_file(output / "model.safetensors"), without_aliases(kind, run.main), cast)
    assert_same(load_file(output / "ema.safetensors"), without_aliases(kind, run.ema), cast)


def test_the_average_is_not_the_live_model_but_shares_what_is_not_trained(odd: Trained, output: Path) -> None:
    to_hf(odd.checkpoint, odd.base, output, "--dtype", "original")
    live, average = load_file(output / "model.safetensors"), load_file(output / "ema.safetensors")
    same = {name for name in live if torch.equal(live[name], average[name])}
    assert same == {"frozen.weight", "frozen.bias", "seen", "mask", "mean", "nothing"}
    facts = json.loads((output / "shardsmith.json").read_text())["models"]
    assert (facts["main"]["not_averaged"], facts["ema"]["not_averaged"]) == ([], sorted(same))


@pytest.mark.parametrize("model", ["main", "ema"])
@pytest.mark.parametrize(("kind", "ranks"), [("llama", 2), ("qwen2", 2), ("qwen2", 1)])
def test_from_pretrained_answers_like_the_live_model(
    kind: str, ranks: int, model: str, trained: Runs, output: Path
) -> None:
    run = trained[kind, ranks]
    to_hf(run.checkpoint, run.base, output, "--dtype", "float32", "--models", model)
    assert torch.equal(loaded_logits(output), logits_of(kind, run.main if model == "main" else run.ema))


@pytest.mark.parametrize("model", ["main", "ema"])
@pytest.mark.parametrize("metadata", [True, False], ids=["with metadata.json", "without it"])
def test_tied_embeddings_are_written_once(
    metadata: bool, model: str, trained: Runs, tmp_path: Path, output: Path
) -> None:
    run = trained["qwen2", 2]
    checkpoint = shutil.copytree(run.checkpoint, tmp_path / "checkpoint")
    if not metadata:
        (checkpoint / "metadata.json").unlink()
    to_hf(checkpoint, run.base, output, "--models", model, "--dtype", "float32")
    expected = without_aliases("qwen2", run.main if model == "main" else run.ema)
    assert_same(load_file(output / "model.safetensors"), expected)
    tied = json.loads((output / "shardsmith.json").read_text())["models"][model]["tied"]
    assert tied == {"lm_head.weight": "model.embed_tokens.weight"}


@pytest.mark.parametrize("layout", ["flat", "nested"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "odd"])
def test_a_plain_dcp_save_is_read(kind: str, layout: str, trained: Runs, output: Path) -> None:
    run = trained[kind, 2]
    to_hf(run.plain[layout], run.base, output, "--dtype", "original")
    assert_same(load_file(output / "model.safetensors"), without_aliases(kind, run.main))
    assert not (output / "ema.safetensors").exists()


def test_exceptions_from_the_dtype_go_by_the_names_in_the_files(trained: Runs, output: Path) -> None:
    run = trained["qwen2", 1]
    to_hf(run.checkpoint, run.base, output, "--dtype_of", "*norm*=float32", "*.bias=original")
    for name, tensor in load_file(output / "model.safetensors").items():
        exception = "norm" in name or name.endswith("bias")
        assert tensor.dtype == (torch.float32 if exception else torch.bfloat16)


def test_a_hugging_face_directory_is_exported_again_in_another_dtype(trained: Runs, output: Path) -> None:
    run = trained["qwen2", 2]
    first = to_hf(run.checkpoint, run.base, output, "--dtype", "float32", "--max_shard_size", "20KB")
    second = to_hf(first, first, output.with_name("second"))
    assert_same(load_file(second / "model.safetensors"), without_aliases("qwen2", run.main), torch.bfloat16)
    assert_same(load_file(second / "ema.safetensors"), without_aliases("qwen2", run.ema), torch.bfloat16)
    assert listing(second) == COPIED | {"model.safetensors", "ema.safetensors", "shardsmith.json", "README.md"}


def test_one_safetensors_file_is_exported(trained: Runs, tmp_path: Path, output: Path) -> None:
    run = trained["llama", 2]
    save_file(run.main, tmp_path / "weights.safetensors", {"format": "pt"})
    to_hf(tmp_path / "weights.safetensors", run.base, output, "--dtype", "float16")
    assert_same(load_file(output / "model.safetensors"), run.main, torch.float16)


def test_large_weights_are_written_as_shards_with_an_index(trained: Runs, output: Path) -> None:
    run = trained["llama", 2]
    to_hf(run.checkpoint, run.base, output, "--dtype", "float32", "--models", "main", "--max_shard_size", "40 KB")
    index = json.loads((output / "model.safetensors.index.json").read_text())
    shards = sorted(output.glob("model-*.safetensors"))
    assert [path.name for path in shards] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert index["weight_map"] == {name: path.name for path in shards for name in load_file(path)}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in run.main.values())
    assert not (output / "model.safetensors").exists()
    assert torch.equal(loaded_logits(output), logits_of("llama", run.main))


FILES = {  # options -> weight files in OUTPUT_DIR and in OUTPUT_DIR-ema
    "--models main": ({"model"}, None),
    "--models main --ema_as directory": ({"model"}, None),
    "--models ema": ({"model"}, None),
    "--models ema --ema_as directory": ({"model"}, None),
    "--models ema --ema_as file": ({"ema"}, None),
    "--models both": ({"model", "ema"}, None),
    "--models both --ema_as file": ({"model", "ema"}, None),
    "--models both --ema_as directory": ({"model"}, {"model"}),
    "--models all --ema_as directory": ({"model"}, {"model"}),
    "--models all": ({"model", "ema"}, None),
}


@pytest.mark.parametrize(("options", "files"), FILES.items(), ids=FILES)
def test_models_go_where_they_are_asked_to(
    options: str, files: tuple[set[str], set[str] | None], odd: Trained, output: Path
) -> None:
    to_hf(odd.checkpoint, odd.base, output, *options.split())
    for directory, stems in zip((output, Path(f"{output}-ema")), files, strict=True):
        assert directory.exists() == (stems is not None)
        assert {path.stem for path in directory.glob("*.safetensors")} - {"ae"} == (stems or set())
    average = Path(f"{output}-ema") if files[1] else output
    stem = "ema" if "ema" in files[0] else "model"
    expected = odd.main if "main" in options else odd.ema
    assert_same(load_file(average / f"{stem}.safetensors"), odd.ema if stem == "ema" or files[1] else expected, BF16)


def test_both_directories_of_a_checkpoint_load(trained: Runs, output: Path) -> None:
    run = trained["llama", 2]
    to_hf(run.checkpoint, run.base, output, "--ema_as", "directory", "--dtype", "float32")
    assert torch.equal(loaded_logits(output), logits_of("llama", run.main))
    assert torch.equal(loaded_logits(Path(f"{output}-ema")), logits_of("llama", run.ema))
    assert listing(output) == listing(Path(f"{output}-ema"))


def test_where_the_base_keeps_its_weights_in_ema_the_average_alone_goes_there(
    odd: Trained, tmp_path: Path, output: Path
) -> None:
    base = shutil.copytree(odd.base, tmp_path / "base")
    save_file(odd.main, base / "ema.safetensors")
    to_hf(odd.checkpoint, base, output, "--models", "ema", "--dtype", "original")
    assert_same(load_file(output / "ema.safetensors"), odd.ema)
    assert not (output / "model.safetensors").exists()


def test_the_directory_holds_the_base_models_files_and_not_its_weights(odd: Trained, output: Path) -> None:
    to_hf(odd.checkpoint, odd.base, output)
    assert listing(output) == COPIED | {"model.safetensors", "ema.safetensors", "shardsmith.json", "README.md"}
    for name in COPIED - {"config.json"}:
        assert (output / name).read_bytes() == (odd.base / name).read_bytes()


def test_python_files_are_copied_only_on_request(odd: Trained, output: Path) -> None:
    to_hf(odd.checkpoint, odd.base, output)
    assert not [name for name in listing(output) if name.endswith(".py")]
    trusting = to_hf(odd.checkpoint, odd.base, output.with_name("trusting"), "--trust_remote_code")
    assert {name for name in listing(trusting) if name.endswith(".py")} == {"modeling_odd.py", "assets/code.py"}


def test_a_base_in_the_hugging_face_cache_gives_a_directory_without_links(
    odd: Trained, tmp_path: Path, output: Path
) -> None:
    snapshot = tmp_path / "models--org--odd" / "snapshots" / "0123"
    blobs = shutil.copytree(odd.base, tmp_path / "models--org--odd" / "blobs")
    for name in listing(blobs):
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blobs / name, (snapshot / name).parent))
    direct = to_hf(odd.checkpoint, odd.base, output)
    cached = to_hf(odd.checkpoint, snapshot, output.with_name("cached"))
    shutil.rmtree(tmp_path / "models--org--odd")
    assert not [path for path in cached.rglob("*") if path.is_symlink()]
    assert "base_model: org/odd" in (cached / "README.md").read_text()
    for name in listing(direct) - {"shardsmith.json", "README.md"}:
        assert (cached / name).read_bytes() == (direct / name).read_bytes()


CONFIGS = {
    "dtype": ({"dtype": "float32"}, {"dtype": "bfloat16"}),
    "torch_dtype": ({"torch_dtype": "float32"}, {"torch_dtype": "bfloat16"}),
    "none": ({"a": 1}, {"a": 1, "dtype": "bfloat16"}),
    "nested": (
        {"text_config": {"torch_dtype": "float16", "b": "float16"}, "vision_config": {"deep": {"dtype": "float32"}}},
        {
            "text_config": {"torch_dtype": "bfloat16", "b": "float16"},
            "vision_config": {"deep": {"dtype": "bfloat16"}},
            "dtype": "bfloat16",
        },
    ),
    "quantization": (
        {"dtype": "float32", "quantization_config": {"dtype": "float32"}},
        {"dtype": "bfloat16", "quantization_config": {"dtype": "float32"}},
    ),
}


@pytest.mark.parametrize(("config", "expected"), CONFIGS.values(), ids=CONFIGS)
def test_the_config_says_which_dtype_is_there(config: dict[str, Any], expected: dict[str, Any]) -> None:
    assert json.loads(config_for(config, torch.bfloat16)) == expected


@pytest.mark.parametrize(("dtype", "stated"), [("float16", "float16"), ("original", "float32")])
def test_the_config_of_an_export_is_the_bases_but_for_the_dtype(
    dtype: str, stated: str, trained: Runs, output: Path
) -> None:
    run = trained["llama", 2]
    to_hf(run.checkpoint, run.base, output, "--dtype", dtype)
    base = json.loads((run.base / "config.json").read_text())
    assert json.loads((output / "config.json").read_text()) == base | {"dtype": stated}


def test_shardsmith_json_says_where_the_weights_come_from(odd: Trained, output: Path) -> None:
    to_hf(odd.checkpoint, odd.base, output)
    facts = json.loads((output / "shardsmith.json").read_text())
    metadata = json.loads((odd.checkpoint / "metadata.json").read_text())
    assert (facts["source"], facts["step"], facts["base_model"]) == (f"step-{STEP}", STEP, odd.base.name)
    assert facts["source_attempt"] == metadata["attempt"]
    assert facts["ema"] == metadata["ema"]
    assert facts["ema"]["updates"] == STEP
    for model, stem in (("main", "model"), ("ema", "ema")):
        written = load_file(output / f"{stem}.safetensors")
        assert facts["models"][model]["files"] == [f"{stem}.safetensors"]
        assert facts["models"][model]["tensors"] == {
            name: {
                "shape": list(tensor.shape),
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "digest": str(digest_tensor(tensor)),
            }
            for name, tensor in written.items()
        }


def test_digests_of_an_export_in_the_original_dtype_are_those_of_the_save(odd: Trained, output: Path) -> None:
    to_hf(odd.checkpoint, odd.base, output, "--dtype", "original", "--models", "main")
    saved = json.loads((odd.checkpoint / "metadata.json").read_text())["tensors"]
    written = json.loads((output / "shardsmith.json").read_text())["models"]["main"]["tensors"]
    assert {name: record["digest"] for name, record in written.items()} == {
        name: saved[name]["digest"] for name in odd.main
    }


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_modes_are_what_the_umask_leaves(umask: int, odd: Trained, output: Path) -> None:
    to_hf(odd.checkpoint, odd.base, output)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (output, *output.rglob("*"))}
    assert modes == {path: (0o777 if path.is_dir() else 0o666) & ~umask for path in modes}


def test_an_output_whose_parents_are_missing_is_made_with_them(odd: Trained, tmp_path: Path) -> None:
    to_hf(odd.checkpoint, odd.base, tmp_path / "a" / "b" / "out")
    assert os.listdir(tmp_path / "a" / "b") == ["out"]


def test_a_base_with_the_same_names_and_shapes_is_no_obstacle(odd: Trained, tmp_path: Path, output: Path) -> None:
    base = shutil.copytree(odd.base, tmp_path / "base")
    weights = {name: t.bfloat16() if t.is_floating_point() else t for name, t in odd.main.items()}
    save_file(weights, base / "model.safetensors")
    to_hf(odd.checkpoint, base, output, "--dtype", "original")
    assert_same(load_file(output / "model.safetensors"), odd.main)
