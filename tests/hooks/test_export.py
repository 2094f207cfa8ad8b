"""What ``HFExport`` writes: against a full gather, ``save_pretrained`` and ``from_pretrained``, for every sharding."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from shardsmith.errors import CheckpointNotFoundError, MismatchError, ProtectedPathError, UsageError, WriteError
from shardsmith.hooks import EMA, HFExport, Hooks, at, every, last, latest
from shardsmith.manifest.seal import SEAL
from shardsmith.tensors.digest import digest_tensor
from tests.hooks.live_models import CASES, STEP, Case, run_cases
from tests.ranks import run_on_ranks
from tests.trained_runs import TOKENS, answers, build, config_of, loaded_logits, make_base

FROM_TRANSFORMERS = [case for case in CASES if case.kind != "odd"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for each case, with an export by slices in it, one by files, and what that must hold. Read only."""
    root = tmp_path_factory.mktemp("exported")
    for ranks in sorted({case.ranks for case in CASES}):
        cases = [case for case in CASES if case.ranks == ranks]
        if ranks == 0:
            run_cases(cases, root)
        else:
            run_on_ranks(run_cases, ranks, root, cases, root)
    return root


def truth_of(case: Case, exported: Path) -> dict[str, Any]:
    return torch.load(exported / str(case) / "truth.pt", weights_only=True)  # type: ignore[no-any-return]


def places(case: Case, exported: Path) -> dict[str, tuple[Path, str]]:
    """Model -> directory and stem of its files."""
    main = exported / str(case) / "slices" / f"step-{STEP}"
    average = (main.with_name(f"{main.name}-ema"), "model") if case.ema_as == "directory" else (main, "ema")
    return {"main": (main, "model"), **({"ema": average} if case.ema else {})}


def read_weights(directory: Path, stem: str = "model") -> dict[str, Tensor]:
    """By the index, if there is one; it must tell the truth, and nothing else of that stem may be there."""
    index = directory / f"{stem}.safetensors.index.json"
    if not index.exists():
        assert [path.name for path in directory.glob(f"{stem}*.safetensors")] == [f"{stem}.safetensors"]
        return load_file(directory / f"{stem}.safetensors")
    where = json.loads(index.read_text())["weight_map"]
    files = {name: load_file(directory / name) for name in set(where.values())}
    assert files.keys() == {path.name for path in directory.glob(f"{stem}*.safetensors")}
    assert {name: file for file, tensors in files.items() for name in tensors} == where
    return {name: tensor for tensors in files.values() for name, tensor in tensors.items()}


def cast(tensor: Tensor, dtype: str) -> Tensor:
    return tensor.to(getattr(torch, dtype)) if dtype != "original" and tensor.is_floating_point() else tensor


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_tensors_are_those_of_a_full_gather_bit_for_bit(exported: Path, case: Case) -> None:
    truth = truth_of(case, exported)
    assert_equal(truth["main"], truth["twin"])
    for model, (directory, stem) in places(case, exported).items():
        expected = truth["files"][model]
        assert_equal(read_weights(directory, stem), {name: cast(t, case.dtype) for name, t in expected.items()})
    assert any(not torch.equal(tensor, truth["ema"][name]) for name, tensor in truth["main"].items())


@pytest.mark.parametrize("case", [case for case in CASES if case.ranks], ids=str)
def test_the_bytes_are_the_same_when_each_file_is_written_by_one_rank(exported: Path, case: Case) -> None:
    slices, files = (read_files(exported / str(case) / mode) for mode in ("slices", "files"))
    assert slices == files


def read_files(directory: Path) -> dict[str, Any]:
    """Content by name; without what says when the export was made, and the hash that covers it."""
    found: dict[str, Any] = {name: (directory / name).read_bytes() for name in names(directory)}
    for name in [name for name in found if name.endswith("shardsmith.json")]:
        found[name] = {**json.loads(found[name]), "created_at": None, "source": None, SEAL: None}
    return found


@pytest.mark.parametrize("case", FROM_TRANSFORMERS, ids=str)
def test_names_and_config_are_those_of_save_pretrained(exported: Path, case: Case) -> None:
    hub = exported / str(case) / "hub"
    for directory, stem in places(case, exported).values():
        assert read_weights(directory, stem).keys() == read_weights(hub).keys()
        ours, theirs = (json.loads((path / "config.json").read_text()) for path in (directory, hub))
        written = {"float32", "bfloat16"} if case.dtype == "original" else {case.dtype}
        assert ours.pop("dtype") in written
        theirs.pop("dtype")
        assert ours == theirs
        assert (directory / "generation_config.json").exists() == (hub / "generation_config.json").exists()


@pytest.mark.parametrize("case", [c for c in FROM_TRANSFORMERS if c.dtype == "float32"], ids=str)
def test_from_pretrained_answers_as_the_live_model(exported: Path, case: Case) -> None:
    import transformers

    truth = truth_of(case, exported)
    (directory, _), *rest = places(case, exported).values()
    pairs = [("main", directory)] + ([("ema", rest[0][0])] if case.ema_as == "directory" else [])
    for model, place in pairs:
        head = transformers.AutoModelForImageClassification if case.kind == "vit" else transformers.AutoModelForCausalLM
        loaded, info = head.from_pretrained(place, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert loaded.dtype == torch.float32
        live = head.from_config(loaded.config)
        live.load_state_dict(truth[model])
        inputs = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16) if case.kind == "vit" else TOKENS
        with torch.no_grad():
            assert torch.equal(loaded.eval()(inputs).logits, live.eval().float()(inputs).logits)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_shardsmith_json_says_what_the_files_hold(exported: Path, case: Case) -> None:
    for model, (directory, stem) in places(case, exported).items():
        about = json.loads((directory / "shardsmith.json").read_text())
        record = about["models"][model]
        found = read_weights(directory, stem)
        assert about["step"] == STEP
        assert record["tensors"] == {
            name: {
                "shape": list(tensor.shape),
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "digest": str(digest_tensor(tensor)),
            }
            for name, tensor in found.items()
        }
        assert sorted(record["files"]) == sorted(path.name for path in directory.glob(f"{stem}*.safetensors"))
        assert (about["ema"] or {}).get("updates") == (STEP if "ema" in about["models"] else None)


def test_large_weights_are_several_files_none_much_larger_than_asked_for(exported: Path) -> None:
    (case,) = (case for case in CASES if case.max_shard_size == "9KB")
    directory = exported / str(case) / "slices" / f"step-{STEP}"
    for stem in ("model", "ema"):
        files = [*directory.glob(f"{stem}-*-of-*.safetensors")]
        assert len(files) > 3
        for path in files:
            tensors = load_file(path).values()
            assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors) <= 9000


def test_each_export_holds_one_step_while_the_optimizer_goes_on(tmp_path: Path) -> None:
    run_on_ranks(run_filled_steps, 2, tmp_path, tmp_path / "hf")
    average = 0.0
    for step in range(1, 9):
        average = (average + step) / 2
        directory = tmp_path / "hf" / f"step-{step}"
        about = json.loads((directory / "shardsmith.json").read_text())
        assert (about["step"], about["ema"]["updates"]) == (step, step)
        for stem, value in (("model", float(step)), ("ema", average)):
            found = read_weights(directory, stem)
            assert {tuple(tensor.unique().tolist()) for n, tensor in found.items() if n != "seen"} == {(value,)}
            assert found["seen"] == step


def run_filled_steps(directory: Path) -> None:
    model = nn.Sequential(*(nn.Linear(700, 701 - i, bias=False) for i in range(6)))
    model.register_buffer("seen", torch.tensor(0))
    fully_shard(model)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    ema = EMA(model, decay=0.5)
    export = HFExport(directory, model=model, ema=ema, when=every(1), dtype="original", max_shard_size="4MB")
    with Hooks(ema, export) as hooks:
        for step in range(1, 9):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, -1.0)
            optimizer.step()
            model.seen += 1
            hooks.step(step)


def tiny(value: float = 1.0) -> nn.Module:
    model = nn.Linear(3, 2)
    for parameter in model.parameters():
        nn.init.constant_(parameter, value)
    return model


def names(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def word_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", chat_template="{{ messages }}")


def test_the_base_models_other_files_come_along_and_it_is_left_as_it_is(tmp_path: Path) -> None:
    base = make_base("llama", tmp_path / "base")
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in base.rglob("*") if path.is_file()}
    model = build("llama")
    export = HFExport(tmp_path / "hf", model=model, when=at(1), base_model=base, dtype="float32")
    export.export(1)
    export.close()
    directory = tmp_path / "hf" / "step-1"
    copied = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "assets/notes.txt"}
    copied |= {"generation_config.json", "ae.safetensors"}
    assert names(directory) == {*copied, "config.json", "model.safetensors", "shardsmith.json", "README.md"}
    assert all((directory / name).read_bytes() == (base / name).read_bytes() for name in copied)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before} == before
    assert torch.equal(loaded_logits(directory), answers(model))


def test_python_files_come_along_when_they_are_asked_for(tmp_path: Path) -> None:
    base = make_base("odd", tmp_path / "base")
    export = HFExport(tmp_path / "hf", model=tiny(), when=at(1), base_model=base, trust_remote_code=True)
    export.export(1)
    export.close()
    assert {"modeling_odd.py", "assets/code.py"} <= names(tmp_path / "hf" / "step-1")


def test_a_processor_and_extra_files_take_the_place_of_the_base_models(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    base = make_base("llama", tmp_path / "base")
    (tmp_path / "card").write_text("a model card")
    extra = {"README.md": tmp_path / "card", "assets/notes.txt": tmp_path / "card"}
    options: dict[str, Any] = {"base_model": base, "processor": word_tokenizer(), "extra_files": extra}
    export = HFExport(tmp_path / "hf", model=build("llama"), when=at(1), **options)
    export.export(1)
    export.close()
    directory = tmp_path / "hf" / "step-1"
    assert AutoTokenizer.from_pretrained(directory)("b ? a")["input_ids"] == [1, 2, 0]
    assert (directory / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (directory / "README.md").read_text() == (directory / "assets/notes.txt").read_text() == "a model card"


@pytest.mark.parametrize(
    ("dtype", "written"), [("bfloat16", "bfloat16"), ("float16", "float16"), ("original", "float32")]
)
def test_config_json_names_the_dtype_of_the_weights(tmp_path: Path, dtype: str, written: str) -> None:
    export = HFExport(tmp_path, model=build("qwen2"), when=at(1), dtype=dtype)
    export.export(1)
    export.close()
    assert json.loads((tmp_path / "step-1" / "config.json").read_text())["dtype"] == written
    assert {str(t.dtype) for t in read_weights(tmp_path / "step-1").values()} == {f"torch.{written}"}


def test_some_tensors_may_have_another_dtype(tmp_path: Path) -> None:
    dtype = {"*norm*": "float32", "*": "bfloat16"}
    export = HFExport(tmp_path, model=build("qwen2"), when=at(1), dtype=dtype)
    export.export(1)
    export.close()
    for name, tensor in read_weights(tmp_path / "step-1").items():
        assert tensor.dtype == (torch.float32 if "norm" in name else torch.bfloat16)
    assert json.loads((tmp_path / "step-1" / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_average_alone_is_what_from_pretrained_loads(tmp_path: Path) -> None:
    model = build("qwen2")
    ema = EMA(model, decay=0.5)
    expected = answers(model)
    nn.init.zeros_(model.model.norm.weight)
    export = HFExport(tmp_path, model=model, ema=ema, models="ema", when=at(1), dtype="float32")
    export.export(1)
    export.close()
    assert torch.equal(loaded_logits(tmp_path / "step-1"), expected)
    about = json.loads((tmp_path / "step-1" / "shardsmith.json").read_text())
    assert about["ema"] == ema.facts()
    assert [*about["models"]] == ["ema"]


def test_main_alone_can_be_asked_for(tmp_path: Path) -> None:
    model = tiny()
    export = HFExport(tmp_path, model=model, ema=EMA(model), models="main", when=at(1))
    export.export(1)
    export.close()
    assert names(tmp_path) == {f"step-1/{name}" for name in ("model.safetensors", "shardsmith.json", "README.md")}


def test_retention_keeps_the_newest_with_the_directory_of_its_average(tmp_path: Path) -> None:
    model = tiny()
    ema = EMA(model)
    (tmp_path / "step-0").mkdir()  # not ours
    export = HFExport(tmp_path, model=model, ema=ema, ema_as="directory", when=every(1), keep=latest(1))
    with Hooks(ema, export) as hooks:
        for step in range(1, 4):
            hooks.step(step)
    assert {path.name for path in tmp_path.iterdir()} == {"step-0", "step-3", "step-3-ema", ".retention.json"}


def test_on_exported_is_told_of_each_directory_on_the_main_thread(tmp_path: Path) -> None:
    told: list[tuple[int, bool, bool]] = []

    def on_exported(step: int, path: Path) -> None:
        told.append((step, path == tmp_path / f"step-{step}" and path.is_dir(), is_main_thread()))

    with Hooks(HFExport(tmp_path, model=tiny(), when=every(2) | last(), on_exported=on_exported)) as hooks:
        for step in range(1, 6):
            hooks.step(step)
    assert told == [(2, True, True), (4, True, True), (5, True, True)]


def is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def test_the_last_step_is_exported_once(tmp_path: Path) -> None:
    with Hooks(HFExport(tmp_path, model=tiny(), when=every(2) | last())) as hooks:
        for step in range(1, 5):
            hooks.step(step)
    assert {path.name for path in tmp_path.iterdir()} == {"step-2", "step-4"}


@pytest.mark.parametrize(
    "options",
    [
        {"models": "ema"},  # there is none
        {"dtype": "int8"},
        {"dtype": "bf61"},
        {"dtype": {"*": "bf61"}},
        {"max_shard_size": "5 parsecs"},
        {"write_mode": "file"},
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_at_once(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        HFExport(tmp_path / "hf", model=tiny(), when=at(1), **options)
    assert not (tmp_path / "hf").exists()


def test_a_pattern_of_dtypes_that_fits_no_tensor_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'norm' decides about no tensor"):
        HFExport(tmp_path, model=tiny(), when=at(1), dtype={"norm": "float32", "*": "bfloat16"})


def test_a_base_model_that_is_not_there_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="base"):
        HFExport(tmp_path / "hf", model=tiny(), when=at(1), base_model=tmp_path / "base")


def test_a_directory_within_the_base_model_is_refused_at_once(tmp_path: Path) -> None:
    config_of("llama").save_pretrained(tmp_path / "base")
    with pytest.raises(ProtectedPathError, match="only read"):
        HFExport(tmp_path / "base" / "hf", model=tiny(), when=at(1), base_model=tmp_path / "base")
    assert not (tmp_path / "base" / "hf").exists()


def test_a_base_model_of_other_shapes_is_refused_with_every_difference(tmp_path: Path) -> None:
    config_of("llama").save_pretrained(tmp_path / "base")
    other = build("llama")
    other.resize_token_embeddings(104)
    other.model.layers[1].mlp.up_proj.register_parameter("bias", nn.Parameter(torch.zeros(50)))
    other.save_pretrained(tmp_path / "base")
    with pytest.raises(MismatchError) as error:
        HFExport(tmp_path / "hf", model=build("llama"), when=at(1), base_model=tmp_path / "base")
    named = [problem.split(":")[0] for problem in error.value.problems]
    assert named == ["lm_head.weight", "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.bias"]
    way_round = "leave HFExport out and export saved steps:\nshardsmith to-hf --checkpoint STEP --base-model BASE"
    assert way_round in str(error.value)  # HFExport has no --allow of its own


class Gate:
    """A processor whose saving does not end before it is let through."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.reached = threading.Event()

    def save_pretrained(self, directory: Path) -> None:
        self.reached.set()
        assert self.open.wait(60)
        (directory / "processor").touch()


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open.set()


def two_in_flight(directory: Path, model: nn.Module, gate: Gate, **options: Any) -> HFExport:
    """One being written, one staged behind it; the weights are the step."""
    export = HFExport(directory, model=model, when=every(1) | last(), processor=gate, dtype="float32", **options)
    for step in (1, 2):
        fill(model, step)
        export.on_step_end(step)
    assert gate.reached.wait(60)
    return export


def fill(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


def exported_values(directory: Path) -> dict[str, float]:
    return {path.name: float(read_weights(path)["weight"].unique()) for path in directory.iterdir()}


def test_a_third_export_waits_for_the_first(tmp_path: Path, gate: Gate) -> None:
    model = tiny()
    export = two_in_flight(tmp_path, model, gate, when_busy="wait")
    fill(model, 3)
    with ThreadPoolExecutor(1) as training:
        third = training.submit(export.on_step_end, 3)
        assert wait([third], timeout=0.3).not_done
        gate.open.set()
        third.result(60)
    export.close()
    assert exported_values(tmp_path) == {"step-1": 1, "step-2": 2, "step-3": 3}


def test_a_third_export_is_skipped_if_that_is_wanted_but_not_the_last_one(
    tmp_path: Path, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny()
    export = two_in_flight(tmp_path, model, gate, when_busy="skip")
    for step in (3, 4):
        fill(model, step)
        export.on_step_end(step)
    assert caplog.text.count("was not exported: two exports are in flight") == 2
    gate.open.set()
    export.on_train_end(4)
    export.close()
    assert exported_values(tmp_path) == {"step-1": 1, "step-2": 2, "step-4": 4}


def test_a_third_export_is_refused_on_all_ranks_if_that_is_wanted(tmp_path: Path) -> None:
    run_on_ranks(run_refused_third, 2, tmp_path, tmp_path / "hf")
    assert exported_values(tmp_path / "hf") == {"step-1": 1, "step-2": 2, "step-4": 4}


def run_refused_third(directory: Path) -> None:
    model, gate = tiny(), Gate()
    fully_shard(model)
    if dist.get_rank() != 0:
        gate.reached.set()  # only rank 0 gets there
    export = two_in_flight(directory, model, gate, when_busy="raise")
    with pytest.raises(UsageError, match="step 3 cannot be exported: two exports are in flight"):
        export.on_step_end(3)
    gate.open.set()
    export.wait()
    fill(model, 4)
    export.on_step_end(4)
    export.close()


class Broken:
    """A processor that cannot be saved at first."""

    def __init__(self) -> None:
        self.works = False

    def save_pretrained(self, directory: Path) -> None:
        if not self.works:
            raise ZeroDivisionError("no processor today")
        (directory / "processor").touch()


def test_a_failure_in_the_background_is_raised_once_and_the_next_export_works(tmp_path: Path) -> None:
    told: list[int] = []
    processor = Broken()
    options: dict[str, Any] = {"processor": processor, "on_exported": lambda step, _: told.append(step)}
    export = HFExport(tmp_path, model=tiny(), when=every(1), **options)
    export.on_step_end(1)
    with pytest.raises(ZeroDivisionError, match="no processor today"):
        export.wait()
    assert [*tmp_path.iterdir()] == []
    processor.works = True
    export.on_step_end(1)
    export.close()
    assert told == [1]


def test_a_failure_in_the_background_is_only_logged_if_that_is_wanted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    processor = Broken()
    export = HFExport(tmp_path, model=tiny(), when=every(1), processor=processor, on_error="warn")
    export.on_step_end(1)
    export.wait()
    processor.works = True
    export.on_step_end(2)
    export.close()
    assert "step 1 was not exported" in caplog.text
    assert "no processor today" in caplog.text
    made = ("model.safetensors", "shardsmith.json", "processor", "README.md")
    assert names(tmp_path) == {f"step-2/{name}" for name in made}


def test_a_failed_export_does_not_hide_that_a_later_one_succeeded(tmp_path: Path) -> None:
    told: list[int] = []
    (tmp_path / "step-1").mkdir()
    export = HFExport(tmp_path, model=tiny(), when=every(1), on_exported=lambda step, _: told.append(step))
    export.export(1)
    export.export(2)
    with pytest.raises(FileExistsError):
        export.close()
    assert told == [2]


def test_a_missing_extra_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    export = HFExport(tmp_path / "hf", model=tiny(), when=at(1), extra_files={"a.txt": tmp_path / "nowhere"})
    export.on_step_end(1)
    with pytest.raises(WriteError, match="nowhere"):
        export.close()
