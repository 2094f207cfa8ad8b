from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from shardsmith.errors import CheckpointNotFoundError, ProtectedPathError, UnsafeCheckpointError, WriteError
from shardsmith.hf.base_files import choose_files
from shardsmith.hf.hf_directory import config_for, copy_files, protect, read_config, ties_word_embeddings
from shardsmith.tensors.tensors import TensorSpec

KEPT = [
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "README.md",
    "LICENSE",
    "ae.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "additional_chat_templates/tool.jinja",
]
LEFT_OUT = [
    "diffusion_pytorch_model.safetensors",
    "model.fp16.safetensors",
    "renamed.safetensors",
    "of-another-project.bin",
    "adapter_model.safetensors",
    "adapter_config.json",
    "trainer_state.json",
    "training_args.bin",
    "scheduler.pt",
    "rng_state_0.pth",
    "rng_state.pth",
    "scaler.pt",
    "trainer_log.jsonl",
    "all_results.json",
    "runs/Nov28/events.out.tfevents.1.host.0",
    # accelerate
    "optimizer.bin",
    "optimizer_1.bin",
    "scheduler.bin",
    "sampler_1.bin",
    "dl_state_dict.bin",
    "random_states_0.pkl",
    "custom_checkpoint_0.pkl",
    "pytorch_model_fsdp_0/__0_0.distcp",
    "optimizer_0/__0_0.distcp",
    # DeepSpeed
    "latest",
    "latest_universal",
    "zero_to_fp32.py",
    "global_step500/mp_rank_00_model_states.pt",
    "global_step500/zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "zero_pp_rank_0_mp_rank_00_model_states.pt",
    "pytorch_model/mp_rank_00_model_states.pt",
    # Megatron, Lightning, verl, torch
    "latest_checkpointed_iteration.txt",
    "iter_0000500/mp_rank_00/model_optim_rng.pt",
    "hparams.yaml",
    "model_world_size_2_rank_0.pt",
    "extra_state_world_size_2_rank_0.pt",
    "__0_0.distcp",
    "step-500/__0_0.distcp",
    "unreadable.safetensors",
    "checkpoint-500/model.safetensors",
    "model.safetensors",
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
    "model.safetensors.index.fp16.json",
    "model.safetensors.bak",
    "pytorch_model.bin.index.fp16.json",
    "consolidated.safetensors.index.json",
    "ema.safetensors",
    "ema-00001-of-00002.safetensors",
    "ema.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model-00001-of-00002.bin",
    "pytorch_model.bin.index.json",
    "tf_model.h5",
    "flax_model.msgpack",
    "original/consolidated.00.pth",
    "onnx/model.onnx",
    "onnx/model_q4.onnx_data",
    "openvino_model.bin",
    "openvino/openvino_model.xml",
    "model-q4.gguf",
    "optimizer.pt",
    "shardsmith.json",
    ".gitattributes",
    ".cache/huggingface/download.lock",
    ".git/config",
    "vae/.gitignore",
]
CODE = ["modeling_x.py", "parts/tools.py"]
RENAMED, UNLIKE_NAMES = "renamed.safetensors", "of-another-project.bin"
MODEL = {
    name: TensorSpec(name, shape, torch.float32)
    for name, shape in {"embed.weight": (7, 5), "mlp.up.weight": (11, 5), "mlp.down.weight": (5, 11)}.items()
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    for name in (*KEPT, *LEFT_OUT, *CODE):
        (tmp_path / "base" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "base" / name).write_text(name)
    other = {"decoder.conv_in.weight": torch.zeros(3, 4), "decoder.conv_out.weight": torch.zeros(4, 3)}
    for name in ("ae.safetensors", "vae/diffusion_pytorch_model.safetensors"):
        save_file(other, tmp_path / "base" / name)
    save_file({f"module.{name}": torch.zeros(spec.shape) for name, spec in MODEL.items()}, tmp_path / "base" / RENAMED)
    torch.save(
        {"layers": {name[::-1]: torch.zeros(s.shape) for name, s in MODEL.items()}}, tmp_path / "base" / UNLIKE_NAMES
    )
    return tmp_path / "base"


def files_to_copy(base: Path, *, trust_remote_code: bool = False) -> list[str]:
    return list(choose_files(base, MODEL, trust_remote_code=trust_remote_code).copies)


def test_everything_but_weights_code_and_hidden_files_is_copied(base: Path) -> None:
    assert files_to_copy(base) == sorted(KEPT)


def test_weights_of_other_parts_are_listed_with_their_size_and_what_is_not_copied_with_its_reason(base: Path) -> None:
    files = choose_files(base, MODEL)
    others = ["ae.safetensors", "vae/diffusion_pytorch_model.safetensors"]
    assert files.weights == {name: (base / name).stat().st_size for name in others}
    assert files.left_out[RENAMED] == files.left_out[UNLIKE_NAMES] == "weights of the model itself"
    assert "cannot be read" in files.left_out["unreadable.safetensors"]
    assert not {"ae.safetensors", "config.json"} & files.left_out.keys()


def test_weights_in_formats_that_are_not_read_are_not_copied_and_are_named(base: Path) -> None:
    content = {
        "net.mlpackage/Data/com.apple.CoreML/weights/weight.bin": b"\2\0\0\0",
        "net.mlpackage/Manifest.json": b"{}",
        "fp16/ir.xml": b'<?xml version="1.0"?>\n<net name="Model0" version="11">',
        "fp16/ir.bin": b"\0\1",
        "small/q4.bin": b"GGUF\3\0\0\0",
        "keras/weights.dat": b"\x89HDF\r\n\x1a\n",
        "tf/model.h5": b"",
        "saved_model/variables/variables.data-00000-of-00001": b"",
        "mobile/model.tflite": b"",
    }
    data = {"data/lexicon.bin": b"\0\1", "data/terms.xml": b"<terms/>"}
    for name, begins in {**content, **data}.items():
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_bytes(begins)
    found = choose_files(base, MODEL)
    assert set(found.copies) == {*KEPT, *data}
    assert (
        content.keys() | {"onnx/model.onnx", "tf_model.h5", "model-q4.gguf"}
        <= found.unread.keys() & found.not_copied.keys()
    )
    assert any("Core ML" in line and "weight.bin" in line for line in found.unread_lines)


def test_all_code_is_copied_if_it_is_asked_for(base: Path) -> None:
    assert files_to_copy(base, trust_remote_code=True) == sorted(KEPT + CODE)


@pytest.mark.parametrize(
    ("name", "auto_map"),
    [
        ("config.json", {"AutoConfig": "modeling_x.Config", "AutoModel": "modeling_x.Model"}),
        ("tokenizer_config.json", {"AutoTokenizer": [None, "modeling_x.Tokenizer"]}),
    ],
)
def test_code_that_a_config_names_is_copied(base: Path, name: str, auto_map: dict[str, Any]) -> None:
    (base / name).write_text(json.dumps({"auto_map": {**auto_map, "AutoOther": "org/name--modeling_y.Model"}}))
    assert files_to_copy(base) == sorted({*KEPT, name, "modeling_x.py"})


def test_a_copy_has_the_content_and_the_size_that_is_reported(base: Path, tmp_path: Path) -> None:
    sizes = copy_files(base, files_to_copy(base), tmp_path / "copy")
    assert sizes == {name: (base / name).stat().st_size for name in KEPT}
    assert all((tmp_path / "copy" / name).read_bytes() == (base / name).read_bytes() for name in KEPT)


def test_links_are_copied_as_what_they_lead_to(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("{}")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").symlink_to("../blob")
    copy_files(tmp_path / "base", files_to_copy(tmp_path / "base"), tmp_path / "copy")
    assert not (tmp_path / "copy" / "config.json").is_symlink()
    assert (tmp_path / "copy" / "config.json").read_text() == "{}"


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("nowhere")], ids=["pipe", "dangling link"])
def test_what_cannot_be_copied_is_refused_before_anything_is(make: Callable[[Path], object], base: Path) -> None:
    make(base / "extra.json")
    with pytest.raises(UnsafeCheckpointError, match=r"extra\.json: is not a regular file"):
        files_to_copy(base)


def test_a_file_that_goes_missing_is_a_write_error(base: Path, tmp_path: Path) -> None:
    with pytest.raises(WriteError, match=r"copying .*gone\.json failed: No such file"):
        copy_files(base, ["gone.json"], tmp_path / "copy")


def test_a_base_must_be_a_directory_with_a_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="must be a directory"):
        files_to_copy(tmp_path / "org" / "name")
    with pytest.raises(CheckpointNotFoundError, match=r"has no config\.json"):
        read_config(tmp_path)


def test_a_config_keeps_its_letters_and_the_order_of_its_keys() -> None:
    config = {"z": "ä日本", "dtype": "float32", "a": [1, {"dtype": "float32"}]}
    text = config_for(config, torch.float16).decode()
    assert "ä日本" in text
    assert list(json.loads(text).items()) == [*(config | {"dtype": "float16"}).items()]


@pytest.mark.parametrize(
    ("config", "ties"),
    [
        ({}, False),
        ({"tie_word_embeddings": False}, False),
        ({"tie_word_embeddings": True}, True),
        ({"text_config": {"tie_word_embeddings": True}}, True),
        ({"tie_word_embeddings": "yes"}, False),
    ],
)
def test_ties_are_what_the_config_or_its_text_part_says(config: dict[str, object], ties: bool) -> None:
    assert ties_word_embeddings(config) is ties


def test_outputs_beside_the_inputs_are_not_refused(base: Path, tmp_path: Path) -> None:
    for output in (tmp_path / "out", tmp_path / "base-2", tmp_path / "a" / "base", base / ".." / "out"):
        protect(output, base, base / "model.safetensors")


def test_an_output_beside_a_weights_file_is_not_in_it(base: Path) -> None:
    protect(base / "out", base / "model.safetensors")
    with pytest.raises(ProtectedPathError):
        protect(base / "model.safetensors", base / "model.safetensors")


def test_a_file_that_is_another_name_of_an_input_is_protected(base: Path, tmp_path: Path) -> None:
    os.link(base / "model.safetensors", tmp_path / "other-name")
    with pytest.raises(ProtectedPathError, match="only read"):
        protect(tmp_path / "other-name", base / "model.safetensors")


SECOND_NAMES = [  # a second name, what it is a name of, and outputs that would touch the base
    ("mounted", "base", ["mounted", "mounted/out", "mounted/vae/deep/out"]),
    ("mounted", "base/vae", ["mounted", "mounted/out"]),  # a part of the base alone
    ("mounted", ".", ["mounted", "mounted/base", "mounted/base/out"]),
    ("BASE", "base", ["BASE", "BASE/out", "BASE/vae/out"]),  # as where case does not matter
]


@pytest.mark.parametrize(("name", "meant", "outputs"), SECOND_NAMES)
def test_a_folder_under_a_second_name_is_protected_by_what_it_is(
    name: str, meant: str, outputs: list[str], base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the kernel says of a bind mount, or where case does not matter: another name, the same device and inode."""
    root, stat = base.parent, os.stat
    (root / name).mkdir()

    def stat_as_mounted(path: Path, **options: Any) -> os.stat_result:
        within = Path(path).is_relative_to(root / name)
        return stat(root / meant / Path(path).relative_to(root / name) if within else path, **options)

    monkeypatch.setattr(os, "stat", stat_as_mounted)
    for output in outputs:
        with pytest.raises(ProtectedPathError, match="only read; choose another output"):
            protect(root / output, base)
    protect(root / "mounted-out", base)


NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")
"""What may bind mounts without being root, where the kernel lets users have that; where not, the test above is left."""
MAY_MOUNT = subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode == 0
MOUNTED = """
import sys
from pathlib import Path
from shardsmith.errors import ProtectedPathError
from shardsmith.hf.hf_directory import protect
base, *outputs = map(Path, sys.argv[1:])
for output in outputs:
    try:
        protect(output, base)
    except ProtectedPathError:
        print("refused")
"""

if MAY_MOUNT:

    def test_a_real_bind_mount_of_the_base_or_of_a_part_of_it_is_refused(base: Path, tmp_path: Path) -> None:
        meant = {"all": base, "part": base / "vae", "around": base.parent}
        outputs = [tmp_path / "all" / "out", tmp_path / "part" / "out", tmp_path / "around" / "base" / "out"]
        for name in meant:
            (tmp_path / name).mkdir()
        mounts = [f"mount --bind {shlex.quote(str(place))} {name}" for name, place in meant.items()]
        python = shlex.join([sys.executable, "-c", MOUNTED, str(base), *map(str, outputs)])
        command = [*NAMESPACE, "sh", "-c", " && ".join([*mounts, python])]
        ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert ran.stdout.splitlines() == ["refused"] * 3, ran.stderr
