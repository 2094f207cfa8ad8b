"""A checkpoint of quantised weights beside their scales, and a model of plain ones: what can be compared is."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from shardsmith.compare.findings import Diagnosis
from shardsmith.compare.verification import VerifyOptions, verify
from shardsmith.diagnose import Questions, diagnose
from shardsmith.diagnose.logits import verify_logits
from shardsmith.errors import UnsupportedFormatError
from tests.dcp_directories import save
from tests.families.tiny import all_families, make_tiny

FAMILIES = {family.kind: family for family in all_families()}
LLAMA = FAMILIES["LlamaForCausalLM"]
Scheme = Callable[[str, Tensor], Mapping[str, Tensor]]


def blocks(dtype: torch.dtype, scale: str) -> Scheme:
    def quantise(name: str, value: Tensor) -> Mapping[str, Tensor]:
        scales = torch.ones(-(-value.shape[0] // 16), -(-value.shape[1] // 16))
        return {name: value.to(dtype), f"{name}{scale}": scales}

    return quantise


def of_activations(name: str, value: Tensor) -> Mapping[str, Tensor]:
    module = name.removesuffix(".weight")
    scales = {f"{module}.weight_scale": torch.ones(()), f"{module}.input_scale": torch.ones(())}
    cache = {f"{module.rpartition('.')[0]}.k_scale": torch.ones(())} if module.endswith("k_proj") else {}
    return {name: value.to(torch.float8_e4m3fn), **scales, **cache}


def eight_bits(name: str, value: Tensor) -> Mapping[str, Tensor]:
    rows = value.abs().amax(1)
    numbers = (value / rows[:, None] * 127).round().to(torch.int8)
    return {name: numbers, f"{name}.SCB": rows, f"{name}.weight_format": torch.tensor(0, dtype=torch.uint8)}


def four_bits(name: str, value: Tensor) -> Mapping[str, Tensor]:
    beside = {f"{name}.absmax": torch.ones(4), f"{name}.quant_map": torch.ones(16)}
    return {name: torch.zeros(value.numel() // 2, 1, dtype=torch.uint8), **beside}


def packed(name: str, value: Tensor) -> Mapping[str, Tensor]:
    module = name.removesuffix(".weight")
    numbers = torch.zeros(value.shape[1] // 8, value.shape[0], dtype=torch.int32)
    zeros = torch.zeros(1, value.shape[0] // 8, dtype=torch.int32)
    return {f"{module}.qweight": numbers, f"{module}.qzeros": zeros, f"{module}.scales": torch.ones(1, value.shape[0])}


SCHEMES: dict[str, Scheme] = {
    "fp8 e4m3": blocks(torch.float8_e4m3fn, "_scale_inv"),
    "fp8 e5m2": blocks(torch.float8_e5m2, "_scale_inv"),
    "int8": blocks(torch.int8, "_scale"),
    "fp8 with scales of activations": of_activations,
    "bitsandbytes 8 bits": eight_bits,
    "bitsandbytes 4 bits": four_bits,
    "gptq": packed,
}


def quantised(state: Mapping[str, Tensor], scheme: Scheme) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        found |= scheme(name, value) if "proj" in name and value.ndim == 2 else {name: value}
    return found


@pytest.fixture
def base(tmp_path: Path) -> Path:
    make_tiny(LLAMA).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def state() -> dict[str, Tensor]:
    return {name: value.detach() for name, value in make_tiny(LLAMA).to(torch.bfloat16).state_dict().items()}


def directory(base: Path, state: Mapping[str, Tensor]) -> Path:
    """Return a Hugging Face directory as a quantisation leaves it."""
    path = base.parent / "quantised"
    path.mkdir()
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (path / "config.json").write_text(json.dumps(config))
    save_file({name: value.contiguous() for name, value in state.items()}, path / "model.safetensors", {"format": "pt"})
    return path


def look(checkpoint: Path, base: Path, level: str = "all") -> tuple[Diagnosis, set[str]]:
    said = diagnose(checkpoint, base, Questions(level=level))  # type: ignore[arg-type]
    return said, {finding.code for finding in said.faults}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantised_weights_with_scales_are_not_accused(scheme: str, base: Path, state: dict[str, Tensor]) -> None:
    checkpoint = directory(base, quantised(state, SCHEMES[scheme]))
    number = sum("proj" in name for name in state)
    assert look(checkpoint, base, "structure")[1] == set()
    for level in ("model", "all"):
        said, codes = look(checkpoint, base, level)
        assert (codes, said.exit_code) == (set(), 2)
        unseen = [line for one in said.levels for line in one.unseen]
        assert unseen
        assert all(f"{number} quantized weights beside their scales" in line for line in unseen)
    # What is plain on both sides was compared.
    facts = next(one.facts for one in said.levels if one.level == "values")["main"]
    assert (facts["tensors compared"], facts["equal"]) == (len(state) - number, len(state) - number)
    assert f"{number} quantized ones not compared" in said.verdict


@pytest.mark.parametrize("scheme", SCHEMES)
def test_verify_refuses_the_pair_in_either_order(scheme: str, base: Path, state: dict[str, Tensor]) -> None:
    checkpoint = directory(base, quantised(state, SCHEMES[scheme]))
    for pair in ((checkpoint, base), (base, checkpoint)):
        for by in ("values", "digests"):
            with pytest.raises(UnsupportedFormatError, match="quantized weights beside their scales") as error:
                verify(*pair, VerifyOptions(by=by))  # type: ignore[arg-type]
            assert error.value.path == checkpoint
    with pytest.raises(UnsupportedFormatError, match="quantized weights beside their scales"):
        verify_logits(checkpoint, base, "main", VerifyOptions(tolerance=1e-3))
    assert verify(checkpoint, checkpoint, VerifyOptions()).same


def test_a_sharded_checkpoint_in_wrappers_too(base: Path, state: dict[str, Tensor]) -> None:
    inner = {name.removeprefix("model."): value for name, value in state.items()}
    inner.pop("lm_head.weight", None)
    for number, held in enumerate((inner, {f"_orig_mod.{name}": value for name, value in state.items()})):
        checkpoint = save({"model": quantised(held, SCHEMES["fp8 e4m3"])}, base.parent / f"step-{number}")
        _, codes = look(checkpoint, base)
        assert codes <= {"missing-tensors"} if number == 0 else codes == set()
        with pytest.raises(UnsupportedFormatError, match="beside their scales"):
            verify(checkpoint, base)


def test_faults_beside_quantised_weights_are_found(base: Path, state: dict[str, Tensor]) -> None:
    held = quantised(state, SCHEMES["fp8 e4m3"])
    weight = "model.layers.0.mlp.up_proj.weight"
    lost = {name: value for name, value in held.items() if name != f"{weight}_scale_inv"}
    cases: dict[str, tuple[dict[str, Tensor], str]] = {
        "kind-differs": (lost, weight),
        "missing-tensors": ({name: value for name, value in lost.items() if name != weight}, weight),
        "shape-differs": ({**held, weight: held[weight][:8]}, weight),
        "extra-tensors": ({**held, "model.layers.7.mlp.up_proj.weight": torch.ones(2, 2)}, "model.layers.7"),
        "not-finite": ({**held, weight: torch.full(state[weight].shape, torch.nan).to(torch.float8_e4m3fn)}, weight),
        "tensor-not-loaded": ({**held, "model.norm.weight": torch.randn(state["model.norm.weight"].shape)}, "norm"),
    }
    for code, (tensors, name) in cases.items():
        save_file({n: v.contiguous() for n, v in tensors.items()}, base.parent / "model.safetensors")
        said, codes = look(base.parent / "model.safetensors", base)
        if code == "tensor-not-loaded":
            assert len(codes) == 1, codes
        else:
            assert code in codes
        named = [finding.where for finding in said.faults if finding.code == code or code == "tensor-not-loaded"]
        assert all(name in where for where in named[0]), named


@pytest.mark.parametrize(
    ("scheme", "value"), [("fp8 e4m3", torch.nan), ("bitsandbytes 4 bits", torch.inf), ("gptq", torch.nan)]
)
def test_scales_that_are_no_numbers_are_found(scheme: str, value: float, base: Path, state: dict[str, Tensor]) -> None:
    held = quantised(state, SCHEMES[scheme])
    scale = next(name for name in held if name not in state and held[name].is_floating_point())
    held[scale] = torch.full_like(held[scale], value)
    said, codes = look(directory(base, held), base, "values")
    assert codes == {"not-finite"}
    assert [finding.where for finding in said.faults] == [(scale,)]


@pytest.mark.parametrize("beside", [{"table": 8}, {"mask": 8, "offset": 0}], ids=["a table", "and an offset"])
def test_a_weight_that_is_lacking_beside_whole_numbers_is_missing(
    beside: dict[str, int], base: Path, state: dict[str, Tensor]
) -> None:
    module = "model.layers.0.mlp.up_proj"
    held = {name: value for name, value in state.items() if name != f"{module}.weight"}
    for name, size in beside.items():
        held[f"{module}.{name}"] = torch.ones(size, 2, dtype=torch.int32) if size else torch.ones(4)
    said, _ = look(directory(base, held), base, "structure")
    missing = [name for finding in said.faults if finding.code == "missing-tensors" for name in finding.where]
    assert missing == [f"{module}.weight"]


def test_experts_in_one_tensor_have_scales_of_their_own(tmp_path: Path) -> None:
    """Of two weights in one module one has lost its scales."""
    from shardsmith.compare.quantized import find_quantized
    from shardsmith.formats.by_path import open_source

    plain = {"experts.gate_up_proj": torch.ones(2, 4, 4), "experts.down_proj": torch.ones(2, 4, 4)}
    held = {name: value.to(torch.float8_e4m3fn) for name, value in plain.items()}
    save_file(plain, tmp_path / "plain.safetensors")
    save_file({**held, "experts.down_proj_scale_inv": torch.ones(2, 1, 1)}, tmp_path / "held.safetensors")
    specs = open_source(tmp_path / "plain.safetensors", "main").specs
    found = find_quantized(open_source(tmp_path / "held.safetensors", "main"), specs)
    assert found.weights == {"experts.down_proj"}
    assert found.beside == {"experts.down_proj_scale_inv"}
