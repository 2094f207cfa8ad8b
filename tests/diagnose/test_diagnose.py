from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from shardsmith.cli import main
from shardsmith.compare.verification import VerifyOptions, verify
from shardsmith.diagnose import Diagnosis, Questions, diagnose
from shardsmith.diagnose.live_model import LiveModel
from shardsmith.diagnose.structure import look_at_structure
from shardsmith.diagnose.subject import Reference, Subject
from shardsmith.diagnose.values import look_at_values
from shardsmith.name_maps.maps import ENTRY_POINTS
from shardsmith.name_maps.slices import Slice
from shardsmith.tensors.tensors import TensorSpec
from tests.dcp_directories import edit_index, save, save_sharded
from tests.diagnose.test_diagnose_planted import codes
from tests.diagnosed_models import FAMILIES, Specimen, config_of
from tests.planted_faults import halves_to_pairs, random_like
from tests.test_imports import HEAVY

Average = Callable[[Tensor, Tensor], Tensor]
LAYOUTS = (None, "model")
RANKS = (1, 2, 3, 8)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WRAPPERS = ("", "_orig_mod.", "module.")


@pytest.fixture(scope="module")
def olmo(specimens: dict[str, Specimen]) -> Specimen:
    return specimens["olmo2"]


@pytest.fixture
def good(olmo: Specimen, tmp_path: Path) -> Path:
    """A checkpoint of four ranks with nothing wrong."""
    return save_sharded(olmo.state, tmp_path / "good", 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_good_checkpoints_of_all_kinds_have_no_finding(
    family: str, specimens: dict[str, Specimen], tmp_path: Path
) -> None:
    """3 families x 2 layouts x 4 numbers of ranks x 3 dtypes x 3 wrappers = 216 checkpoints, along both dimensions."""
    specimen = specimens[family]
    for i, (layout, ranks, dtype, wrapper) in enumerate(itertools.product(LAYOUTS, RANKS, DTYPES, WRAPPERS)):
        state = {wrapper + name: tensor.to(dtype) for name, tensor in specimen.state.items()}
        checkpoint = save_sharded(state, tmp_path / str(i), ranks, dim=i % 2, nested=layout)
        assert_clean(checkpoint, specimen.base)
        shutil.rmtree(checkpoint)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_good_checkpoints_have_no_finding_on_the_model_level(
    family: str, dtype: torch.dtype, specimens: dict[str, Specimen], tmp_path: Path
) -> None:
    specimen = specimens[family]
    state = {f"_orig_mod.{name}": tensor.to(dtype) for name, tensor in specimen.state.items()}
    checkpoint = save_sharded(state, tmp_path / "good", 2, nested="model")
    found = diagnose(checkpoint, specimen.base, Questions(batch=specimen.batch))
    assert (found.faults, found.unseen, found.exit_code) == ((), (), 0)
    facts = found.levels[2].facts
    assert abs(facts["loss with the checkpoint's weights"] - facts["loss of the model"]) < 0.005


def near_ties(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A mixture of experts whose router likes all experts nearly alike, so that rounding decides between them."""
    return {
        name: tensor[:1] * (1 + 1e-4 * torch.arange(len(tensor))[:, None]) if "mlp.gate." in name else tensor
        for name, tensor in state.items()
    }


@pytest.mark.parametrize("harmed", [False, True])
def test_a_token_that_rounding_sends_to_another_expert_is_no_fault(
    harmed: bool, specimens: dict[str, Specimen], tmp_path: Path
) -> None:
    specimen = specimens["qwen3-moe"]
    model = specimen.model()
    model.load_state_dict(near_ties(specimen.state))
    model.save_pretrained(tmp_path / "base")
    state = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    if harmed:
        state["model.norm.weight"] *= 1.02
    checkpoint = save_sharded(state, tmp_path / "c", 2)
    found = diagnose(checkpoint, tmp_path / "base", Questions(level="model", batch=specimen.batch))
    assert found.levels[-1].facts["KL a token, largest"] > 0.02
    assert codes(found) == ({"logits-differ"} if harmed else set())


def test_the_model_itself_has_no_finding(olmo: Specimen) -> None:
    assert diagnose(olmo.base, olmo.base, Questions()).exit_code == 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_trained_checkpoints_with_an_average_have_no_finding(
    family: str, layout: str | None, specimens: dict[str, Specimen], tmp_path: Path
) -> None:
    state = trained_state(specimens[family], layout)
    found = diagnose(save(state, tmp_path / "step-7"), specimens[family].base, Questions(level="values"))
    assert found.faults == ()
    assert "trained-weights" in {note.code for note in found.notes}


AVERAGES = {
    "ema-equals-main": lambda main, _base: main,
    "ema-never-moved": lambda _main, base: base,
    "ema-low-precision": lambda main, base: half_way(main, base).bfloat16(),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("code", AVERAGES)
def test_an_average_that_is_none_is_found(
    family: str, code: str, specimens: dict[str, Specimen], tmp_path: Path
) -> None:
    state = trained_state(specimens[family], None, AVERAGES[code])
    found = diagnose(save(state, tmp_path / "step-7"), specimens[family].base, Questions(level="values"))
    assert codes(found) == {code}


def test_missing_and_extra_tensors_are_all_named(olmo: Specimen, tmp_path: Path) -> None:
    gone = [name for name in olmo.state if ".q_proj." in name]
    state = {name: tensor for name, tensor in olmo.state.items() if name not in gone}
    state["adapter.weight"] = torch.zeros(3)
    found = structure(save_sharded(state, tmp_path / "c", 2), olmo)
    by_code = {finding.code: finding.where for finding in found.faults}
    assert by_code == {"missing-tensors": tuple(gone), "extra-tensors": ("adapter.weight",)}
    facts = found.levels[0].facts["main"]
    assert facts["difference"] == 3 - 2 * 64 * 64
    assert facts["difference in percent"] == pytest.approx(100 * (2 * 64 * 64 - 3) / 74_240, abs=1e-4)


def test_other_shapes_are_found_with_both(olmo: Specimen, tmp_path: Path) -> None:
    state = olmo.state | {"model.embed_tokens.weight": torch.zeros(100, 64)}
    (finding,) = structure(save_sharded(state, tmp_path / "c", 2), olmo).faults
    assert (finding.code, finding.where) == ("shape-differs", ("model.embed_tokens.weight",))
    assert "[96, 64]" in finding.expected
    assert "[100, 64]" in finding.found


HEADS = {
    "linear": {"ln.weight": 64, "ln.bias": 64, "proj.weight": (64, 64), "proj.bias": 64},
    "mlp, version 1": {
        "ln.weight": 64,
        "ln.bias": 64,
        "ffn.0.weight": (64, 64),
        "ffn.0.bias": 64,
        "ffn.3.weight": (64, 64),
        "ffn.3.bias": 64,
    },
    "mlp, version 2": {"gate_proj.weight": (128, 64), "up_proj.weight": (128, 64), "down_proj.weight": (64, 128)},
    "gated": {"gate.weight": (64, 64), "gate.bias": 64, "ffn.0.weight": (96, 64), "ffn.3.weight": (64, 96)},
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_future_predictor_is_no_fault_and_named_as_such(kind: str, olmo: Specimen, tmp_path: Path) -> None:
    head = {name: torch.randn(shape) for name, shape in HEADS[kind].items()}
    found = structure(save_sharded(olmo.state | head, tmp_path / "c", 2, nested="model"), olmo)
    assert found.faults == ()
    (note,) = (note for note in found.notes if note.code == "extra-head")
    assert kind in note.found


def test_a_head_that_no_trainer_can_load_is_a_fault(olmo: Specimen, tmp_path: Path) -> None:
    head = {f"{name}_proj.weight": torch.randn(64, 64) for name in ("gate", "up", "down")}
    (fault,) = structure(save_sharded(olmo.state | head, tmp_path / "c", 2), olmo).faults
    assert "mlp, version 2, has (128, 64)" in fault.found


def test_buffers_that_older_code_saved_are_no_fault(olmo: Specimen, tmp_path: Path) -> None:
    state = olmo.state | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    found = structure(save_sharded(state, tmp_path / "c", 2), olmo)
    assert found.faults == ()
    assert "non-persistent-buffers" in {note.code for note in found.notes}


def test_a_tied_head_counts_once_and_may_be_absent(specimens: dict[str, Specimen], tmp_path: Path) -> None:
    specimen = specimens["llama-tied"]
    once = {name: tensor for name, tensor in specimen.state.items() if name != "lm_head.weight"}
    counts = []
    for name, state in (("once", once), ("twice", specimen.state)):
        found = structure(save_sharded(state, tmp_path / name, 2), specimen)
        assert found.faults == ()
        counts.append(found.levels[0].facts["main"]["difference"])
    assert counts == [0, 0]


SHIFTS_TWICE = """
from transformers import Olmo2Config, Olmo2ForCausalLM

class Twice(Olmo2ForCausalLM):
    def forward(self, input_ids=None, labels=None, **more):
        if labels is not None:
            labels = labels.roll(-1, 1)
        return super().forward(input_ids=input_ids, labels=labels, **more)
"""


class Numbered:
    """A name map: the names of a trainer that numbers its tensors, and stores matrices the other way round."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def targets(self, specs: Mapping[str, TensorSpec]) -> dict[str, Slice]:
        found = {}
        for key, spec in specs.items():
            whole = Slice.whole(spec)
            name = self.names[int(key.removeprefix("p."))]
            found[name] = whole.permute(1, 0) if len(spec.shape) == 2 else whole
        return found


def numbered(config: object, title: str = "") -> Numbered:  # noqa: ARG001
    """As an entry point offers it."""
    return Numbered(title.split(","))


@pytest.mark.parametrize("sign", ["optimizer beside it", "step in its name", "step of an export"])
def test_files_of_a_trained_model_may_differ(sign: str, olmo: Specimen, tmp_path: Path) -> None:
    checkpoint = tmp_path / ("checkpoint-500" if sign == "step in its name" else "run")
    checkpoint.mkdir()
    moved = {name: tensor + 0.01 for name, tensor in olmo.state.items()}
    save_file(moved, checkpoint / "model.safetensors")
    save_file({name: (moved[name] + olmo.state[name]) / 2 for name in moved}, checkpoint / "ema.safetensors")
    assert codes(diagnose(checkpoint, olmo.base, Questions(level="values", trained=False))) == {"values-differ"}
    if sign == "optimizer beside it":
        (checkpoint / "optimizer.00000-of-00001.pt").write_bytes(b"")
    if sign == "step of an export":
        (checkpoint / "shardsmith.json").write_text('{"step": 500}')
    assert diagnose(checkpoint, olmo.base, Questions(level="values")).faults == ()


def test_logits_tell_what_the_other_levels_were_not_asked_for(olmo: Specimen, tmp_path: Path) -> None:
    state = olmo.state | {"model.norm.weight": torch.ones(64)}
    found = diagnose(save_sharded(state, tmp_path / "c", 2), olmo.base, Questions(level="model", batch=olmo.batch))
    assert codes(found) == {"logits-differ"}
    facts = found.levels[-1].facts
    assert facts["loss with the checkpoint's weights"] > facts["loss of the model"] + 0.05
    assert facts["KL a token, largest"] > facts["KL a token, mean"] > 0


def test_a_tokenizer_with_more_tokens_than_rows_is_found(good: Path, olmo: Specimen, tmp_path: Path) -> None:
    content = json.loads((olmo.base / "tokenizer.json").read_text())
    content["model"]["vocab"]["more"] = 96
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps(content))
    found = diagnose(good, olmo.base, Questions(level="model", tokenizer=tmp_path / "tokenizer"))
    assert codes(found) == {"tokenizer-too-large"}


def test_an_index_that_contradicts_itself_and_one_that_leads_away_are_findings(good: Path, olmo: Specimen) -> None:
    index = (good / ".metadata").read_bytes()
    edit_index(good, lambda metadata: metadata.state_dict_metadata["lm_head.weight"].chunks.reverse())
    edit_index(good, lambda metadata: setattr(metadata.state_dict_metadata["lm_head.weight"], "size", torch.Size([5])))
    assert codes(structure(good, olmo)) == {"corrupt-checkpoint"}
    (good / ".metadata").write_bytes(index.replace(b"__0_0.distcp", b"../../../etc"))
    assert codes(structure(good, olmo)) == {"unsafe-checkpoint"}


def test_a_name_map_of_ones_own_brings_names_and_values_into_place(
    olmo: Specimen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = EntryPoint("numbered", "tests.diagnose.test_diagnose:numbered", ENTRY_POINTS)
    monkeypatch.setattr(
        "shardsmith.name_maps.maps.entry_points", lambda group: [point] if group == ENTRY_POINTS else []
    )
    own = {f"p.{i}": t.T.contiguous() if t.dim() == 2 else t for i, t in enumerate(olmo.state.values())}
    checkpoint = save_sharded(own, tmp_path / "c", 3)
    assert {"missing-tensors", "extra-tensors"} <= codes(structure(checkpoint, olmo))
    names = f"numbered:{','.join(olmo.state)}"
    assert diagnose(checkpoint, olmo.base, Questions(names=names)).exit_code == 0
    assert verify(checkpoint, olmo.base, VerifyOptions(names=names)).same
    assert main(["diagnose", "--checkpoint", str(checkpoint), "--model", str(olmo.base), "--names", "unknown"]) == 2


def test_names_of_torchtitans_own_models_are_told(olmo: Specimen, tmp_path: Path) -> None:
    own = {name.replace("self_attn.q_proj", "attention.wq"): tensor for name, tensor in olmo.state.items()}
    missing = structure(save_sharded(own, tmp_path / "c", 2), olmo).faults[0]
    assert missing.code == "missing-tensors"
    assert "--titan-model" in missing.found
    tune = {name.replace("input_layernorm.weight", "sa_norm.scale"): tensor for name, tensor in own.items()}
    tune |= {"tok_embeddings.weight": tune.pop("model.embed_tokens.weight"), "layers.0.sa_norm.scale": torch.ones(64)}
    missing = structure(save_sharded(tune, tmp_path / "tune", 2), olmo).faults[0]
    assert "as models of torchtune" in missing.found
    assert "--titan-model" not in missing.found


def test_of_two_whole_models_each_is_named_with_what_leaves_one(olmo: Specimen, tmp_path: Path) -> None:
    two = {f"{root}.{name}": tensor for root in ("policy", "reference") for name, tensor in olmo.state.items()}
    checkpoint = save_sharded(two, tmp_path / "c", 2)
    (missing,) = (fault for fault in structure(checkpoint, olmo).faults if fault.code == "missing-tensors")
    assert "Each of policy, reference holds all tensors of the model" in missing.found
    cure = missing.found.rpartition("shardsmith to-hf ")[2].replace("'", "").split()
    where = ["--checkpoint", str(checkpoint), "--base-model", str(olmo.base), "--output-dir", str(tmp_path / "out")]
    assert main(["to-hf", *where, *cure, "--dtype", "original"]) == 0
    assert diagnose(tmp_path / "out", olmo.base, Questions(level="values")).exit_code == 0


def test_what_looks_wrong_and_is_not_is_explained(specimens: dict[str, Specimen], tmp_path: Path) -> None:
    specimen = specimens["llama-tied"]
    state = {f"wrapped._orig_mod.{name}": tensor.bfloat16() for name, tensor in specimen.state.items()}
    checkpoint = save_sharded(state, tmp_path / "c", 2, nested="model")
    config_of("llama-tied", dtype="float16", use_cache=False).save_pretrained(tmp_path / "trainer")
    found = diagnose(checkpoint, specimen.base, Questions(config=tmp_path / "trainer"))
    assert found.faults == ()
    notes = {"tied-weights", "nested-layout", "wrapped-names", "names-translated", "other-dtype", "rounded-values"}
    assert {note.code for note in found.notes} == notes | {"harmless-settings"}


@pytest.mark.parametrize(("layout", "wanted"), [(None, "nested"), ("model", "flat")])
def test_the_wrong_layout_is_found_where_the_wanted_one_is_known(
    layout: str | None, wanted: str, olmo: Specimen, tmp_path: Path
) -> None:
    checkpoint = save_sharded(olmo.state, tmp_path / "c", 2, nested=layout)
    assert codes(diagnose(checkpoint, olmo.base, Questions(level="structure", layout=wanted))) == {"wrong-layout"}


@pytest.mark.parametrize(
    ("mine", "others"),
    [
        ("step-0", ["step-1"]),
        ("step-0", ["hf-export-step-500"]),
        ("step-0", ["step-500", "step-1000"]),
        ("checkpoint-0", ["checkpoint-500", "checkpoint-1000"]),
    ],
)
def test_a_newer_step_beside_an_initial_one_is_found(
    mine: str, others: list[str], olmo: Specimen, tmp_path: Path
) -> None:
    checkpoint = save_sharded(olmo.state, tmp_path / mine, 2)
    assert structure(checkpoint, olmo).faults == ()
    for other in others:
        (tmp_path / other).mkdir()
    (finding,) = structure(checkpoint, olmo).faults
    assert (finding.code, finding.where) == ("newer-step-beside", tuple(others))
    assert finding.found == f"{others[-1]} is"


def test_a_hole_in_the_chunks_is_found(good: Path, olmo: Specimen) -> None:
    edit_index(good, lambda metadata: metadata.state_dict_metadata["lm_head.weight"].chunks.pop())
    (finding,) = structure(good, olmo).faults
    assert finding.code == "incomplete-checkpoint"
    assert "lm_head.weight" in finding.found


SETTINGS = {
    "initial-load-off": "[checkpoint]\nfolder = 'none'\ninitial_load_path = '{good}'",
    "another-checkpoint-loaded": "[checkpoint]\nenable = true\nfolder = 'none'\ninitial_load_path = '{base}'",
    "initial-load-skipped": "[checkpoint]\nenable = true\nfolder = 'there'\ninitial_load_path = '{good}'",
    "wrong-layout": "[checkpoint]\nenable = true\ninitial_load_path = '{good}'\ninitial_load_model_only = true",
}


@pytest.mark.parametrize("code", SETTINGS)
def test_settings_of_the_trainer_that_keep_it_from_this_checkpoint_are_found(
    code: str, olmo: Specimen, tmp_path: Path
) -> None:
    checkpoint = save_sharded(olmo.state, tmp_path / "c", 2, nested="model" if code == "wrong-layout" else None)
    settings = tmp_path / "train.toml"
    (tmp_path / "outputs" / "there").mkdir(parents=True)
    settings.write_text(
        SETTINGS[code].format(good=checkpoint, base=olmo.base) + f"\n[job]\ndump_folder = '{tmp_path}/outputs'"
    )
    assert codes(diagnose(checkpoint, olmo.base, Questions(level="model", training_config=settings))) == {code}


def test_settings_that_are_right_have_no_finding(good: Path, olmo: Specimen, tmp_path: Path) -> None:
    settings = tmp_path / "train.toml"
    model = f"[model]\nconfig = '{olmo.base}/config.json'\ntokenizer_path = '{olmo.base}'\n"
    settings.write_text(f"{model}[checkpoint]\nenable_checkpoint = true\ninitial_load_path = '{good}'")
    found = diagnose(good, olmo.base, Questions(level="model", training_config=settings))
    assert (found.faults, found.unseen) == ((), ())


def test_the_verdict_says_that_the_weights_are_fine(good: Path, olmo: Specimen) -> None:
    verdict = diagnose(good, olmo.base, Questions()).verdict
    assert "The weights are fine: 25 of 25 tensors are the model's, bit for bit" in verdict
    assert "InitialLoad" in verdict


def test_the_command_prints_a_report_json_and_html(
    olmo: Specimen, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "<script>alert(1)</script>[bold]"
    checkpoint = save_sharded(olmo.state | {evil: torch.zeros(2)}, tmp_path / "c", 2)
    command = ["diagnose", "--checkpoint", str(checkpoint), "--model", str(olmo.base), "--level", "structure"]
    assert main([*command, "--html", str(tmp_path / "report.html")]) == 1
    assert evil in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    assert page.count("<script") == 1  # the page's own
    assert "alert(1)</script>" not in page
    assert "extra-tensors" in page
    assert main([*command, "--json"]) == 1
    (finding,) = json.loads(capsys.readouterr().out)["findings"]
    assert (finding["code"], finding["where"]) == ("extra-tensors", [evil])
    assert all(finding[name] for name in ("severity", "expected", "found", "effect", "fix"))


def test_a_good_checkpoint_exits_with_0_and_what_is_not_there_with_2(
    good: Path, olmo: Specimen, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["diagnose", "--checkpoint", str(good), "--model", str(olmo.base)]) == 0
    assert "The weights are fine" in capsys.readouterr().out
    for arguments in ([tmp_path / "none", olmo.base], [good, tmp_path / "none"], [tmp_path, olmo.base]):
        checkpoint, model = map(str, arguments)
        assert main(["diagnose", "--checkpoint", checkpoint, "--model", model]) == 2
        assert "shardsmith: " in capsys.readouterr().err


def test_structure_is_looked_at_without_what_only_models_and_loads_need(good: Path, olmo: Specimen) -> None:
    """Importing that takes longer than all the rest."""
    command = ["diagnose", "--checkpoint", str(good), "--model", str(olmo.base), "--level", "structure", "--json"]
    program = f"import sys; from shardsmith.cli import main; main({command}); print(*sys.modules, file=sys.stderr)"
    ran = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert set(ran.stderr.split()).isdisjoint(HEAVY)


@pytest.mark.usefixtures("dynamic_modules")
def test_code_of_the_model_runs_where_it_is_trusted_and_that_of_the_checkpoint_never(
    good: Path, olmo: Specimen, tmp_path: Path
) -> None:
    model = shutil.copytree(olmo.base, tmp_path / "model")
    for folder in (model, good):
        canary = tmp_path / f"ran-{folder.name}"
        code = "from transformers import Olmo2Config as OwnConfig, Olmo2ForCausalLM\n"
        code += f"open({str(canary)!r}, 'w').close()\nclass OwnModel(Olmo2ForCausalLM):\n    pass\n"
        (folder / "own.py").write_text(code)
        config = json.loads((model / "config.json").read_text())
        config["auto_map"] = {"AutoModelForCausalLM": "own.OwnModel"}
        (folder / "config.json").write_text(json.dumps(config))
    assert diagnose(good, model, Questions()).exit_code == 0
    assert not list(tmp_path.glob("ran-*"))
    assert diagnose(good, model, Questions(trust_remote_code=True)).exit_code == 0
    assert [path.name for path in tmp_path.glob("ran-*")] == ["ran-model"]


@pytest.mark.usefixtures("dynamic_modules")
def test_a_model_that_shifts_labels_once_more_is_found(good: Path, olmo: Specimen, tmp_path: Path) -> None:
    model = shutil.copytree(olmo.base, tmp_path / "model")
    (model / "twice.py").write_text(SHIFTS_TWICE)
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "twice.Twice"}
    (model / "config.json").write_text(json.dumps(config))
    found = diagnose(good, model, Questions(level="model", trust_remote_code=True))
    assert codes(found) == {"loss-differs-from-logits"}


def test_several_faults_at_once_are_told_apart(olmo: Specimen, tmp_path: Path) -> None:
    names = ("rows-permuted", "layer-not-loaded", "embedding-differs", "norms-are-one")
    state = dict(olmo.state)
    for name in state:
        if "layers.0." in name and name.endswith(("q_proj.weight", "k_proj.weight")):
            state[name] = halves_to_pairs(state[name])
        elif "layers.1." in name or "embed_tokens" in name:
            state[name] = random_like(state[name])
        elif "layernorm" in name:
            state[name] = torch.ones_like(state[name])
    found = diagnose(save_sharded(state, tmp_path / "c", 2), olmo.base, Questions(level="values"))
    assert codes(found) == set(names)


def test_a_model_that_is_a_config_only_leaves_the_values_unseen(good: Path, olmo: Specimen, tmp_path: Path) -> None:
    shutil.copytree(olmo.base, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    found = diagnose(good, tmp_path / "bare", Questions())
    assert found.faults == ()
    assert found.exit_code == 2
    assert diagnose(good, tmp_path / "bare", Questions(level="structure")).exit_code == 0


def test_a_file_that_has_changed_since_it_was_saved_is_found(trained: dict, tmp_path: Path) -> None:
    run = trained["llama", 2]
    checkpoint = shutil.copytree(run.checkpoint, tmp_path / "step-3")
    base = shutil.copytree(run.base, tmp_path / "base", ignore=shutil.ignore_patterns("*index.json", "*.bin"))
    shard = sorted(checkpoint.glob("*.distcp"))[0]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    found = diagnose(checkpoint, base, Questions(level="values"))
    assert codes(found) == {"damaged-values"}


def half_way(main: Tensor, base: Tensor) -> Tensor:
    return (main + base) / 2


def assert_clean(checkpoint: Path, base: Path) -> None:
    subject = Subject.open(checkpoint, Reference.open(base))
    levels = (look_at_structure(subject), look_at_values(subject))
    subject.close()
    found = Diagnosis(str(checkpoint), str(base), subject.opened.format, levels)
    assert (found.faults, found.unseen, found.exit_code) == ((), (), 0)


def structure(checkpoint: Path, specimen: Specimen) -> Diagnosis:
    return diagnose(checkpoint, specimen.base, Questions(level="structure"))


def trained_state(specimen: Specimen, layout: str | None, average: Average | None = None) -> dict[str, object]:
    """What a run would save some steps later: weights that moved, their average half-way, an optimizer's state."""
    torch.manual_seed(2)
    main = {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in specimen.state.items()}
    if specimen.family == "llama-tied":
        main["lm_head.weight"] = main["model.embed_tokens.weight"]
    average = average or half_way
    averages = {f"ema_model.{name}": average(main[name], specimen.state[name]) for name in main}
    model = {layout: main} if layout else main
    return {**model, **averages, "optimizer.state.step": torch.tensor(7.0)}


class Drawing(torch.nn.Module):
    """Draws, as models do that choose what to mask."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.rand_like(x)


def test_a_model_that_draws_answers_always_alike_and_no_random_numbers_change() -> None:
    def states() -> object:
        if torch.cuda.is_initialized():
            return [state.tolist() for state in (torch.get_rng_state(), *torch.cuda.get_rng_state_all())]
        # The seeds that wait for a device to be used first.
        return torch.get_rng_state().tolist(), list(torch.cuda._lazy_seed_tracker.get_calls())

    before, model = states(), LiveModel(Drawing())
    first = model.answer({"x": torch.zeros(3)})
    assert torch.equal(first, model.answer({"x": torch.zeros(3)}))
    assert before == states()
