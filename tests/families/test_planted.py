"""Each kind of fault, planted into plain checkpoints of ten families: found and named on each level that can see it."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from shardsmith.compare.verification import VerifyOptions, verify
from shardsmith.diagnose import Questions, diagnose
from shardsmith.diagnose.logits import verify_logits
from shardsmith.errors import InitialLoadError
from shardsmith.load.load import verify_loaded

from .tiny import all_families, make_tiny

pytestmark = pytest.mark.filterwarnings("ignore")
State = dict[str, Tensor]
TIED = ("GPT2LMHeadModel", "BertForMaskedLM", "T5ForConditionalGeneration", "WhisperForConditionalGeneration")
UNTIED = (
    *("LlamaForCausalLM", "Qwen3MoeForCausalLM", "ViTForImageClassification", "Wav2Vec2ForCTC"),
    *("CLIPModel", "Qwen2_5_VLForConditionalGeneration"),
)


@dataclass(frozen=True, slots=True)
class Specimen:
    """A good model: its state dict, its base directory, and where faults are planted."""

    state: State
    base: Path
    one: str
    """A matrix that is one in the files, too, perhaps under another name."""
    in_files: str
    """Its name there."""
    other: str
    """Another of the same shape."""
    alias: str | None
    """A name that is tied to another, if there is one."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A kind of fault."""

    codes: frozenset[str]
    """It is found under one of these, and under no other."""
    plant: Callable[[Specimen], State]
    levels: tuple[str, ...] = ("values",)


def changed(change: Callable[[Tensor], Tensor]) -> Callable[[Specimen], State]:
    """The one matrix becomes another."""
    return lambda good: good.state | {good.one: change(good.state[good.one].clone())}


def with_element(value: float) -> Callable[[Tensor], Tensor]:
    def change(matrix: Tensor) -> Tensor:
        matrix[1, 2] = value
        return matrix

    return change


def with_last_bit(matrix: Tensor) -> Tensor:
    """One element is the next float."""
    matrix[1, 2] = torch.nextafter(matrix[1, 2], torch.tensor(torch.inf))
    return matrix


BOTH = ("structure", "values")
FAULTS = {
    "missing": Fault(
        frozenset({"missing-tensors"}), lambda g: {n: t for n, t in g.state.items() if n != g.one}, levels=BOTH
    ),
    "extra": Fault(frozenset({"extra-tensors"}), lambda g: g.state | {f"{g.one}_too": g.state[g.one] + 1}, levels=BOTH),
    "other shape": Fault(frozenset({"shape-differs"}), changed(lambda matrix: matrix[:-1].clone()), levels=BOTH),
    "quantized in place": Fault(
        frozenset({"kind-differs", "values-differ", "values-scaled"}),
        changed(lambda matrix: (matrix * (127 / matrix.abs().max())).round().to(torch.int8)),
        levels=BOTH,
    ),
    "swapped": Fault(
        frozenset({"tensors-swapped"}), lambda g: g.state | {g.one: g.state[g.other], g.other: g.state[g.one]}
    ),
    "permuted": Fault(
        frozenset({"values-reordered", "rows-permuted", "vocabulary-shifted"}),
        changed(lambda matrix: matrix.roll(1, 0)),
    ),
    "scaled": Fault(frozenset({"values-scaled"}), changed(lambda matrix: matrix * 1.5)),
    "not a number": Fault(frozenset({"not-finite"}), changed(with_element(torch.nan))),
    "scaled a little": Fault(frozenset({"values-scaled"}), changed(lambda matrix: matrix * 1.001)),
    "one element": Fault(frozenset({"values-differ"}), changed(with_element(0.5))),
    "the last bit of one element": Fault(frozenset(), changed(lambda matrix: with_last_bit(matrix)), levels=()),
    "a copy of another": Fault(frozenset({"tensors-swapped"}), lambda g: g.state | {g.one: g.state[g.other].clone()}),
    "8 bits without scales": Fault(
        frozenset({"kind-differs"}), changed(lambda matrix: matrix.to(torch.float8_e4m3fn)), levels=BOTH
    ),
}


@pytest.fixture(scope="module", params=(*TIED, *UNTIED))
def good(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Specimen:
    family = next(family for family in all_families() if family.kind == request.param)
    model = make_tiny(family)
    base = tmp_path_factory.mktemp("planted") / "base"
    model.save_pretrained(base)
    state: State = dict(model.state_dict())
    files = load_file(base / "model.safetensors")
    in_files = {_contents(tensor): name for name, tensor in files.items()}
    matrices: dict[torch.Size, list[str]] = {}
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad} - tied
    for name, tensor in state.items():
        if tensor.dim() == 2 and min(tensor.shape) > 4 and _contents(tensor) in in_files and name in trained:
            matrices.setdefault(tensor.shape, []).append(name)
    alike = max(matrices.values(), key=lambda names: sum(map(is_heard, names)))
    one, other = sorted(alike, key=is_heard, reverse=True)[:2]
    alias = next((name for name in model.all_tied_weights_keys if name not in files and state[name].dim() == 2), None)
    assert request.param in IMAGES or (alias is not None) == (request.param in TIED)
    return Specimen(state, base, one, in_files[_contents(state[one])], other, alias)


def loaded(good: Specimen) -> nn.Module:
    """The model as the library builds it, with the good values."""
    config = json.loads((good.base / "config.json").read_text())
    model: nn.Module = getattr(transformers, config["architectures"][0]).from_pretrained(good.base)
    return model


def is_heard(name: str) -> bool:
    """Whether a model as small as these answers otherwise with another matrix: its attention is all but even."""
    return re.search(r"q_proj|k_proj|query|key|qkv|gate|position", name) is None


def _contents(tensor: Tensor) -> tuple[torch.Size, bytes]:
    return tensor.shape, tensor.numpy().tobytes()


def save(state: State, place: Path) -> Path:
    dcp.save(dict(state), checkpoint_id=place, no_dist=True)
    return place


def assert_found(good: Specimen, checkpoint: Path, level: str, codes: frozenset[str], name: str) -> None:
    found = diagnose(checkpoint, good.base, Questions(level=level))  # type: ignore[arg-type]
    assert {finding.code for finding in found.faults} <= codes, found.faults
    assert any(name in finding.where for finding in found.faults), found.faults
    assert found.exit_code == 1


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_is_found_and_named(kind: str, good: Specimen, tmp_path: Path) -> None:
    fault = FAULTS[kind]
    checkpoint = save(fault.plant(good), tmp_path / "checkpoint")
    for level in fault.levels:
        assert_found(good, checkpoint, level, fault.codes, f"{good.one}_too" if kind == "extra" else good.in_files)
    assert not verify(checkpoint, good.base, VerifyOptions()).same


IN_PLACE = [kind for kind in FAULTS if kind not in ("missing", "extra", "other shape")]
"""What names and shapes do not show."""


@pytest.mark.parametrize("kind", [*IN_PLACE, "nothing"])
def test_a_fault_in_the_live_model_is_found_by_its_digests(kind: str, good: Specimen) -> None:
    model = loaded(good)
    if kind == "nothing":
        assert verify_loaded(model, good.base).tensors
        return
    planted = FAULTS[kind].plant(good)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(planted[name])
    with pytest.raises(InitialLoadError, match=re.escape(good.one)):
        verify_loaded(model, good.base)


SEEN_BY_LOGITS = frozenset(
    {"swapped", "permuted", "scaled", "not a number", "one element", "a copy of another", "quantized in place"}
)
LOUD = {"one element": changed(with_element(30.0))}
"""In the place of what such a small model hardly hears."""
HEARD = [kind for kind in FAULTS if kind not in ("scaled a little", "the last bit of one element")]
PAIRS = list(zip(itertools.cycle(HEARD), (*UNTIED, *TIED), strict=False))
"""Each kind of fault that a model can be heard to have, and each family, at least once."""


@pytest.mark.parametrize(("kind", "good"), PAIRS, indirect=["good"])
def test_a_fault_is_found_by_what_the_model_answers(kind: str, good: Specimen, tmp_path: Path) -> None:
    fault = FAULTS[kind]
    checkpoint = save(LOUD.get(kind, fault.plant)(good), tmp_path / "checkpoint")
    found = diagnose(checkpoint, good.base, Questions(level="model"))
    seen = {finding.code for finding in found.faults}
    assert seen <= fault.codes | {"logits-differ"}, found.faults
    assert ("logits-differ" in seen) == (kind in SEEN_BY_LOGITS), (found.faults, found.unseen)
    assert found.exit_code == 1


IMAGES = (
    *("LlavaForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration", "PaliGemmaForConditionalGeneration"),
    *("Idefics3ForConditionalGeneration", "AyaVisionForConditionalGeneration"),
)


@pytest.mark.parametrize("good", IMAGES, indirect=True)
def test_a_fault_in_what_sees_images_is_found_by_what_the_model_answers(good: Specimen, tmp_path: Path) -> None:
    """A text alone would not show it."""
    name = next(n for n, value in good.state.items() if re.search(r"vis.*(fc1|up_proj|qkv|q_proj)\.weight", n))
    whole = diagnose(save(good.state, tmp_path / "good"), good.base, Questions(level="model"))
    assert (whole.faults, whole.exit_code) == ((), 0)
    assert "image" in whole.levels[-1].facts["batch"]
    checkpoint = save(good.state | {name: good.state[name].roll(1, 0)}, tmp_path / "checkpoint")
    found = diagnose(checkpoint, good.base, Questions(level="model"))
    assert {finding.code for finding in found.faults} == {"logits-differ"}
    logits = verify_logits(checkpoint, good.base, "main", VerifyOptions())
    assert (logits.same, "image" in logits.batch) == (False, True)


def test_a_tie_to_another_tensor_is_found_and_named(good: Specimen, tmp_path: Path) -> None:
    """Where the class ties nothing there is none to break: a good checkpoint has no finding."""
    if good.alias is None:
        found = diagnose(save(good.state, tmp_path / "good"), good.base, Questions(level="values"))
        assert (found.faults, found.exit_code) == ((), 0)
        return
    state = good.state | {good.alias: good.state[good.alias].roll(3, 0)}
    checkpoint = save(state, tmp_path / "checkpoint")
    assert_found(good, checkpoint, "values", frozenset({"tie-broken"}), good.alias)
    assert not verify(checkpoint, good.base, VerifyOptions()).same


def test_a_tie_whose_names_have_two_dtypes_is_intact(good: Specimen, tmp_path: Path) -> None:
    """As where a head is kept in float32 beside an embedding in bfloat16."""
    if good.alias is None:
        return
    checkpoint = save(good.state | {good.alias: good.state[good.alias].bfloat16()}, tmp_path / "checkpoint")
    found = diagnose(checkpoint, good.base, Questions(level="values"))
    assert (found.faults, found.exit_code) == ((), 0)
    assert verify(checkpoint, good.base, VerifyOptions(rounding=True)).same


_OF_LAYER = re.compile(r"^(?P<stack>.*(?:layers?|h|block|blocks))\.(?P<number>[0-9]+)\.(?P<rest>.*)$")


def test_a_layer_that_is_there_twice_is_no_tie(good: Specimen, tmp_path: Path) -> None:
    """The copy behind the last layer equals a tensor that the model has, in each value."""
    matches = [match for name in good.state if (match := _OF_LAYER.match(name))]
    stack = matches[0]["stack"]
    last = max(int(match["number"]) for match in matches if match["stack"] == stack)
    copied = {
        f"{stack}.{last + 1}.{match['rest']}": good.state[match[0]].clone()
        for match in matches
        if (match["stack"], int(match["number"])) == (stack, last)
    }
    checkpoint = save(good.state | copied, tmp_path / "checkpoint")
    found = verify(checkpoint, good.base, VerifyOptions())
    assert not found.same
    assert {one.problem for model in found.models for one in model.differences} == {"only in A"}
    for level in BOTH:
        codes = {fault.code for fault in diagnose(checkpoint, good.base, Questions(level=level)).faults}  # type: ignore[arg-type]
        assert codes == {"extra-tensors"}
