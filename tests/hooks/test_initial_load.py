from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedModel

from shardsmith.cli import main
from shardsmith.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    IncompleteCheckpointError,
    InitialLoadError,
    UsageError,
)
from shardsmith.hooks import EMA, Hooks, InitialLoad, ShardedSave, at
from shardsmith.load.load import load_initial, poison_weights, verify_loaded
from tests.dcp_directories import save
from tests.hooks.initial_models import (
    SHARDINGS,
    local,
    made,
    make_sources,
    on_rank,
    options,
    plant_and_verify,
    run_loads,
    started,
)
from tests.ranks import run_on_ranks
from tests.trained_runs import SIZES, TOKENS, Odd

KINDS = ("llama", "qwen2", "olmo2", "odd")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kind of model / format. Read only."""
    root = tmp_path_factory.mktemp("sources")
    for kind in KINDS:
        torch.save(make_sources(kind, root / kind), root / kind / "truth.pt")
    convert = ["to-dcp", "--model", str(root / "olmo2" / "hf"), "--checkpoint", str(root / "olmo2" / "converted")]
    assert main([*convert, "--quiet"]) == 0
    return root


@pytest.mark.parametrize("kind", ["qwen2", "odd"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_format_is_loaded_and_proved_under_every_sharding(
    ranks: int, kind: str, sources: Path, tmp_path: Path
) -> None:
    shardings = [name for name, size in SHARDINGS.items() if size == ranks]
    if ranks == 1:
        run_loads(kind, shardings, sources / kind)
    else:
        shardings = [name for name in shardings if kind != "odd" or name != "fsdp1-flat"]  # some of it is frozen
        run_on_ranks(run_loads, ranks, tmp_path, kind, shardings, sources / kind)


def test_a_cast_is_proved_and_reported(sources: Path) -> None:
    model = started("llama", "none", torch.bfloat16)
    report = load_initial(sources / "llama" / "ours", model=model, repair_buffers=True)  # they were cast, too
    assert report.cast == {"float32 -> bfloat16": 20}, "the last norm stays float32"
    assert report.digests == "recorded, and read where it was cast"
    truth = torch.load(sources / "llama" / "truth.pt")
    assert torch.equal(model.lm_head.weight, truth["lm_head.weight"].bfloat16())


def run_narrow(root: Path) -> None:
    """Both tensors are named on both ranks: the rows with the large values are of one rank each."""
    for source in ("hf", "plain"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).half()
        for layer in model:
            fully_shard(layer)
        fully_shard(model)
        # Of the hook and of what another loader has loaded: torch's own here.
        for load in (lambda m, p: InitialLoad(p, model=m).on_train_begin(0), verify_loaded_by_torch):
            with pytest.raises(InitialLoadError) as caught:
                load(model, root / source)
            told = str(caught.value)
            assert "0.weight: values up to 1e+06 in the checkpoint, and float16 in the model ends at 65504" in told
            assert "1.weight: values up to 70000" in told
            assert caught.value.codes == ["beyond-range"] * 2
            assert "make it in bfloat16 or float32" in told
        wide = model.bfloat16() if source == "hf" else model.float()  # as it says
        load_initial(root / source, model=wide)


def verify_loaded_by_torch(model: nn.Module, path: Path) -> None:
    set_model_state_dict(model, torch.load(path.parent / "truth.pt"), options=StateDictOptions(full_state_dict=True))
    verify_loaded(model, path)


def test_values_that_the_models_dtype_cannot_hold_are_refused_on_all_ranks(tmp_path: Path) -> None:
    state = dict(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).state_dict())
    state["0.weight"][0, 1], state["1.weight"][3, 2] = -1e6, 7e4
    state["0.bias"][2] = torch.inf  # is meant
    torch.save(state, tmp_path / "truth.pt")
    save(state, tmp_path / "plain")
    (tmp_path / "hf").mkdir()
    save_file(state, tmp_path / "hf" / "model.safetensors")
    run_on_ranks(run_narrow, 2, tmp_path, tmp_path)


@pytest.mark.parametrize("source", ["bf16", "bf16-dcp"])
def test_a_narrow_source_into_a_wide_model_is_a_cast_too(source: str, tmp_path: Path) -> None:
    narrow = made("llama", dtype=torch.bfloat16)
    narrow.save_pretrained(tmp_path / "bf16")
    assert (
        main(["to-dcp", "--model", str(tmp_path / "bf16"), "--checkpoint", str(tmp_path / "bf16-dcp"), "--quiet"]) == 0
    )
    model = started("llama", "none")
    report = load_initial(tmp_path / source, model=model)
    assert "bfloat16 -> float32" in report.cast
    assert all(torch.equal(value, narrow.state_dict()[name].float()) for name, value in model.state_dict().items())


def test_a_torch_file_is_a_source_like_any_other(tmp_path: Path) -> None:
    state = made("llama").state_dict()
    torch.save(state, tmp_path / "pytorch_model.bin")
    report = load_initial(tmp_path, model=started("llama", "none"))
    assert (report.source_format, report.tensors) == ("torch", len(state))


def run_stages(path: Path) -> None:
    """Each rank has one stage of a pipeline, with names of its own."""
    rank = dist.get_rank()
    stage = nn.ModuleDict({f"stage{rank}": nn.Linear(3, 3)})
    report = load_initial(path, model=stage)
    assert report.tensors == 4
    with torch.no_grad():
        stage[f"stage{rank}"].weight.add_(rank)
    with pytest.raises(InitialLoadError, match=r"stage1\.weight: other values"):
        verify_loaded(stage, path)


def test_stages_of_a_pipeline_are_one_model(tmp_path: Path) -> None:
    save(nn.ModuleDict({f"stage{i}": nn.Linear(3, 3) for i in range(2)}).state_dict(), tmp_path / "dcp")
    run_on_ranks(run_stages, 2, tmp_path, tmp_path / "dcp")


def cut_the_shards(path: Path) -> None:
    for shard in path.glob("*.distcp"):
        shard.write_bytes(shard.read_bytes()[:100])


def change_a_byte(path: Path) -> None:
    (shard,) = path.glob("*.distcp")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)


def plant_code(path: Path) -> None:
    (path / ".metadata").write_bytes(b"cos\nsystem\n(S'true'\ntR.")


DAMAGED = {
    "cut": (cut_the_shards, IncompleteCheckpointError),
    "a bit flipped": (change_a_byte, InitialLoadError),
    "code in the index": (plant_code, CheckpointError),
    "no such place": (shutil.rmtree, CheckpointNotFoundError),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_or_hostile_checkpoint_is_a_typed_error(case: str, sources: Path, tmp_path: Path) -> None:
    damage, kind = DAMAGED[case]
    path = shutil.copytree(sources / "olmo2" / "converted", tmp_path / "copy")
    damage(path)
    with pytest.raises(kind):
        load_initial(path, model=started("olmo2", "none"))


def zero_rotary(model: nn.Module) -> None:
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq"):
            local(buffer).zero_()


def garble_rotary(model: nn.Module) -> None:
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq"):
            local(buffer).mul_(1.01)


def redraw(*names: str) -> Callable[[nn.Module], None]:
    def plant(model: nn.Module) -> None:
        torch.manual_seed(3)
        for name, parameter in model.named_parameters():
            if any(part in name for part in names):
                local(parameter).normal_()

    return plant


def lose_tie(model: nn.Module) -> None:
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))


def set_norms_to_one(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "norm" in name:
            local(parameter).fill_(1)


def drop_a_norm(model: nn.Module) -> None:
    model.model.layers[0].self_attn.q_norm = nn.Identity()


def swap_rows(model: nn.Module) -> None:
    weight = local(model.model.layers[0].self_attn.q_proj.weight)
    weight[[0, 1]] = weight[[1, 0]]


PLANTED = {
    "inv_freq is zero": ("olmo2", zero_rotary, ["buffer-zero"]),
    "inv_freq is garbage": ("olmo2", garble_rotary, ["buffer-differs"]),
    "a layer was not loaded": ("olmo2", redraw("layers.1."), ["layer-not-loaded"]),
    "lm_head is random": ("llama", redraw("lm_head"), ["head-differs"]),
    "the tie is lost and lm_head random": ("qwen2", lose_tie, ["tie-broken"]),
    "the embedding is random": ("llama", redraw("embed_tokens"), ["embedding-differs"]),
    "all norms are 1": ("olmo2", set_norms_to_one, ["norms-are-one"]),
    "a q norm was dropped": ("olmo2", drop_a_norm, ["qk-norms-dropped"]),
    "nothing was loaded": ("llama", redraw(""), ["nothing-loaded"]),
    "q rows are permuted": ("llama", swap_rows, ["values-differ"]),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_what_is_planted_into_a_loaded_model_is_found_under_its_own_code(fault: str, sources: Path) -> None:
    kind, plant, codes = PLANTED[fault]
    model = started(kind, "none")
    path = sources / kind / "hf"
    load_initial(path, model=model)
    assert plant_and_verify(model, plant, path) == codes


def run_planted(directory: Path) -> None:
    for fault in ("a layer was not loaded", "inv_freq is zero", "all norms are 1"):
        kind, plant, codes = PLANTED[fault]
        model = started(kind, "fsdp2")
        load_initial(directory / kind / "ours", model=model)
        found = plant_and_verify(
            model, lambda m, plant=plant: plant(m) if on_rank(1) else None, directory / kind / "ours"
        )
        expected = {"a layer was not loaded": ["layer-not-loaded"], "all norms are 1": ["values-differ"]}
        assert found == expected.get(fault, codes), fault
    model = started("llama", "ddp")
    load_initial(directory / "llama" / "hf", model=model)
    plant = redraw("up_proj")
    found = plant_and_verify(model, lambda m: plant(m) if on_rank(1) else None, directory / "llama" / "hf")
    assert found == ["replicas-differ"]


def test_what_is_wrong_on_one_rank_is_an_error_on_all(sources: Path, tmp_path: Path) -> None:
    run_on_ranks(run_planted, 2, tmp_path, sources)


def test_what_a_load_of_somebody_else_left_out_is_called_so(sources: Path) -> None:
    model, path = started("olmo2", "none"), sources / "olmo2" / "hf"
    poison_weights(model)
    state = made("olmo2").state_dict()
    model.load_state_dict({name: state[name] for name in state if "layers.1.mlp" not in name}, strict=False)
    with pytest.raises(InitialLoadError, match="not touched by the load") as caught:
        verify_loaded(model, path)
    assert sorted(problem.split(":")[0] for problem in caught.value.problems) == [
        f"model.layers.1.mlp.{name}_proj.weight" for name in ("down", "gate", "up")
    ]


def mixture_of_experts(seed: int, *, tied: bool = False) -> Any:
    import transformers

    torch.manual_seed(seed)
    experts = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 18}
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES, **experts, tie_word_embeddings=tied))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model


@pytest.mark.parametrize("fault", PLANTED)
def test_the_same_is_found_in_a_mixture_of_experts(fault: str, tmp_path: Path) -> None:
    tied = "tie" in fault
    mixture_of_experts(0, tied=tied).save_pretrained(tmp_path / "hf")
    model = mixture_of_experts(1, tied=tied)
    load_initial(tmp_path / "hf", model=model)
    assert plant_and_verify(model, PLANTED[fault][1], tmp_path / "hf") == PLANTED[fault][2]


@pytest.mark.parametrize("tied", [False, True])
def test_fused_experts_are_loaded_from_the_files_of_the_hub(tied: bool, tmp_path: Path) -> None:
    source, model = mixture_of_experts(0, tied=tied), mixture_of_experts(1, tied=tied)
    source.save_pretrained(tmp_path / "hf")
    with pytest.raises(InitialLoadError, match="nothing-loaded"):
        verify_loaded(model, tmp_path / "hf")
    report = load_initial(tmp_path / "hf", model=model)
    state = source.state_dict()
    assert report.tensors == len(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_repaired_buffers_are_reported_and_right(sources: Path) -> None:
    model = started("olmo2", "none")
    expected = {name: buffer.clone() for name, buffer in model.named_buffers()}
    zero_rotary(model)
    report = load_initial(sources / "olmo2" / "hf", model=model, repair_buffers=True)
    assert sorted(report.repaired) == sorted(expected)
    assert all(torch.equal(buffer, expected[name]) for name, buffer in model.named_buffers())
    assert "2 of them were repaired (model.rotary_emb.inv_freq" in report.summary


@pytest.mark.parametrize("repairs", [False, True])
def test_a_refusal_says_whether_buffers_were_overwritten(repairs: bool, sources: Path) -> None:
    model = started("olmo2", "none")
    load_initial(sources / "olmo2" / "hf", model=model)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    zero_rotary(model)
    with torch.no_grad():
        swap_rows(model)
    with pytest.raises(InitialLoadError) as caught:
        verify_loaded(model, sources / "olmo2" / "hf", repair_buffers=repairs)
    assert ("Nothing was changed." in str(caught.value)) is not repairs
    assert (f"Only {len(before)} buffers were changed" in str(caught.value)) is repairs
    assert all(torch.equal(buffer, before[name]) is repairs for name, buffer in model.named_buffers())


def test_a_buffer_cast_with_the_weights_is_found_and_can_be_repaired(sources: Path) -> None:
    model = started("llama", "none").to(torch.bfloat16)
    with pytest.raises(InitialLoadError, match="was cast together with the weights"):
        load_initial(sources / "llama" / "hf", model=model)
    load_initial(sources / "llama" / "hf", model=model, repair_buffers=True)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_settings_that_the_library_keeps_for_itself_are_not_compared(sources: Path) -> None:
    """As ``_attn_implementation_autoset``, which transformers 4 writes for a model that chose its attention itself."""
    model = made("olmo2")
    model.config._chosen_by_itself = True
    load_initial(sources / "olmo2" / "hf", model=model)


SETTINGS = {
    "rope_theta": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}},
        {"rope-differs", "buffer-differs"},
    ),
    "rms_norm_eps": ({"rms_norm_eps": 0.1}, {"norm-eps-differs"}),
    "hidden_act": ({"hidden_act": "relu"}, {"config-differs"}),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("source", ["hf", "converted"])
def test_a_model_that_computes_with_other_settings_is_refused(setting: str, source: str, sources: Path) -> None:
    changes, codes = SETTINGS[setting]
    model = made("olmo2")
    config = copy.deepcopy(model.config)
    for name, value in changes.items():
        setattr(config, name, value)
    other = type(model)(config)
    with pytest.raises(InitialLoadError, match=setting.removeprefix("rms_")) as caught:
        load_initial(sources / "olmo2" / source, model=other)
    assert set(caught.value.codes) == codes
    load_initial(sources / "olmo2" / source, model=other, config=config)  # it is meant so


def test_names_that_do_not_fit_leave_the_model_as_it_was(sources: Path) -> None:
    model = started("qwen2", "none")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InitialLoadError, match="Nothing was loaded; the model is unchanged") as caught:
        load_initial(sources / "olmo2" / "hf", model=model)
    assert {"missing-in-source", "missing-in-model"} <= set(caught.value.codes)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class WithHead(nn.Module):
    """A language model with a head beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 3)
        self.head = nn.Linear(3, 2)


def test_what_is_allowed_to_miss_keeps_its_values_and_is_reported(tmp_path: Path) -> None:
    model, source = WithHead(), nn.ModuleDict({"body": nn.Linear(3, 3), "other": nn.Linear(2, 2)})
    torch.save(source.state_dict(), tmp_path / "x")
    save(source.state_dict(), tmp_path / "dcp")
    head = model.head.weight.detach().clone()
    with pytest.raises(InitialLoadError):
        load_initial(tmp_path / "dcp", model=model)
    report = load_initial(tmp_path / "dcp", model=model, allow_missing=["head.*"], allow_extra=["other.*"])
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.body.weight, source["body"].weight)
    assert (report.missing, report.extra) == (("head.weight", "head.bias"), ("other.weight", "other.bias"))


def tiny_llama(kind: type[PreTrainedModel] = LlamaForCausalLM, **changes: Any) -> PreTrainedModel:
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = LlamaConfig(**{**sizes, "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0, **changes})
    return kind(config)


STARTED: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, list[str]]]] = {
    "a new head": (
        lambda: tiny_llama(LlamaForSequenceClassification, num_labels=3),
        {"allow_missing": ["score.weight"], "allow_extra": ["lm_head.weight"]},
    ),
    "another vocabulary": (
        lambda: tiny_llama(vocab_size=70),
        {"allow_shape": ["model.embed_tokens.weight", "lm_head.weight"]},
    ),
}


@pytest.mark.parametrize("case", STARTED)
def test_the_advice_for_a_new_head_or_vocabulary_leads_to_a_load(case: str, tmp_path: Path) -> None:
    make, allowed = STARTED[case]
    base, model = tiny_llama(), make()
    base.save_pretrained(tmp_path)
    with pytest.raises(InitialLoadError, match="Nothing was loaded; the model is unchanged") as caught:
        load_initial(tmp_path, model=model)
    said = ", ".join(f"{option}={names}" for option, names in allowed.items())
    assert f"If that is meant, as with a new head: {said}; the model keeps its own values there." in str(caught.value)
    before, kept = copy.deepcopy(model.state_dict()), {name for names in allowed.values() for name in names}
    report = load_initial(tmp_path, model=model, **allowed)  # type: ignore[arg-type]
    assert {*report.missing, *report.extra, *report.reshaped} == kept
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, (before if name in kept else base.state_dict())[name]), name


def test_a_size_that_may_differ_excuses_no_other_setting(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    model = tiny_llama(vocab_size=70, rms_norm_eps=1e-3, rope_theta=5e5)
    with pytest.raises(InitialLoadError) as caught:
        load_initial(tmp_path, model=model, allow_shape=["*"])
    assert set(caught.value.codes) == {"norm-eps-differs", "rope-differs", "buffer-differs"}
    assert "  rope_parameters.rope_theta: rope_parameters.rope_theta 500000.0 in the live model" in str(caught.value)
    assert "config=MODEL.config lets the model's own settings count" in str(caught.value)
    report = load_initial(tmp_path, model=model, allow_shape=["*"], config=model.config)
    assert set(report.reshaped) == {"model.embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod."])
def test_what_may_be_extra_does_not_hide_the_names_under_a_wrapper(wrapper: str, tmp_path: Path) -> None:
    model, source = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    state = {**source.state_dict(), "head.weight": torch.ones(2, 3)}
    save({f"{wrapper}{name}": value for name, value in state.items()}, tmp_path / "dcp")
    with pytest.raises(InitialLoadError) as caught:
        load_initial(tmp_path / "dcp", model=model)
    assert caught.value.codes == ["missing-in-model"], "only the head is at fault"
    report = load_initial(tmp_path / "dcp", model=model, allow_extra=["*head*"])
    assert (report.tensors, report.extra) == (4, ("head.weight",))
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in model.state_dict().items())


def test_parts_of_a_model_are_loaded_together(tmp_path: Path) -> None:
    body, head = nn.ModuleDict({"body": nn.Linear(3, 3)}), nn.ModuleDict({"ln": nn.LayerNorm(3)})
    state = {name: torch.randn_like(value) for part in (body, head) for name, value in part.state_dict().items()}
    save(dict(state), tmp_path / "dcp")
    assert load_initial(tmp_path / "dcp", model=[body, head]).tensors == 4
    assert torch.equal(head["ln"].weight, state["ln.weight"])
    with pytest.raises(UsageError, match="same name"):
        load_initial(tmp_path / "dcp", model=[body, body])


def test_a_buffer_without_a_reference_must_be_allowed(sources: Path) -> None:
    model = started("odd", "none")
    with pytest.raises(InitialLoadError) as caught:
        load_initial(sources / "odd" / "ours", model=model)
    assert caught.value.codes == ["buffer-without-reference"]
    report = load_initial(sources / "odd" / "ours", model=model, allow_missing=["angles"])
    assert report.unproved == ("angles",)
    load_initial(sources / "odd" / "ours", model=model, **options("odd"))


def test_a_function_that_makes_the_model_is_a_reference_too(sources: Path) -> None:
    def make() -> nn.Module:
        model = Odd()
        model.angles = torch.arange(4.0)
        return model

    model = started("odd", "none")
    assert load_initial(sources / "odd" / "ours", model=model, fresh=make).buffers == ("angles",)
    model.angles.zero_()
    with pytest.raises(InitialLoadError, match="buffer-zero"):
        verify_loaded(model, sources / "odd" / "ours", fresh=make)


def test_poison_reaches_floats_and_integers_and_is_told_from_values(sources: Path) -> None:
    model, path = started("odd", "none"), sources / "odd" / "ours"
    poison_weights(model, spare=["row.*"])
    assert model.embed.weight.isnan().all()
    assert model.seen.item() == 0x5A5A5A5A5A5A5A5A
    assert not model.row.weight.isnan().any()
    load_initial(path, model=model, poison=False, **options("odd"))
    poison_weights(model, spare=["[!s]*"])
    with pytest.raises(InitialLoadError, match=r"seen: 1 of 1 elements were not touched by the load"):
        verify_loaded(model, path, **options("odd"))


def test_a_tie_that_is_gone_is_loaded_into_both_and_said(sources: Path) -> None:
    model = started("qwen2", "none")
    lose_tie(model)
    report = load_initial(sources / "qwen2" / "hf", model=model)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert report.untied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "NO LONGER TIED" in report.summary


def test_a_model_on_meta_is_refused_with_advice(sources: Path) -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(UsageError, match=r"to_empty"):
        load_initial(sources / "odd" / "ours", model=model)


def test_the_hook_loads_before_the_average_starts_and_not_over_a_resumed_run(
    sources: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def hooks() -> tuple[nn.Module, InitialLoad, Hooks]:
        model = started("olmo2", "none")
        zero_rotary(model)
        load = InitialLoad(sources / "olmo2" / "hf", model=model, repair_buffers=True)
        ema = EMA(model, decay=0.5)
        return model, load, Hooks(ema, ShardedSave(tmp_path, model=model, ema=ema, when=at(1)), load)

    model, load, first = hooks()
    assert first.resume() == 0
    assert load.report is not None
    average = first.hooks[0].state_dict()["model"]
    assert all(torch.equal(average[name], dict(model.named_parameters())[name]) for name in average)
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    first.step(1)
    first.close()
    resumed, load, second = hooks()
    with caplog.at_level(logging.INFO):
        assert second.resume() == 1
    assert load.report is None
    assert torch.equal(resumed.model.norm.weight, model.model.norm.weight)
    assert resumed.model.rotary_emb.inv_freq.any()
    assert "is not loaded, non-persistent buffers are right; repaired model.rotary_emb" in caplog.text
    second.close()


def run_meta_start(path: Path, expected: float) -> None:
    import transformers

    config = transformers.AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        model = getattr(transformers, config.architectures[0])(config)
    for module in [*model.model.layers, model]:
        fully_shard(module)
    model.to_empty(device="cpu")
    for buffer in model.buffers():
        buffer.zero_()  # what transformers 4 left there, as often as not
    tokens = TOKENS % config.vocab_size
    with pytest.raises(InitialLoadError, match="buffer-zero"):
        load_initial(path, model=model)
    load = InitialLoad(path, model=model, repair_buffers=True)
    Hooks(load).resume()
    assert load.report is not None
    assert len(load.report.repaired) == 2
    assert not load.report.untied, "tied tensors are one after to_empty, too"
    assert abs(model(input_ids=tokens, labels=tokens).loss.item() - expected) < 1e-5


@pytest.mark.parametrize("kind", ["olmo2", "qwen2"])
def test_a_model_from_meta_under_fsdp2_starts_at_the_loss_of_the_original(
    kind: str, sources: Path, tmp_path: Path
) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(sources / kind / "hf", dtype=torch.float32)
    tokens = TOKENS % model.config.vocab_size
    expected = model(input_ids=tokens, labels=tokens).loss.item()
    run_on_ranks(run_meta_start, 2, tmp_path, sources / kind / "hf", expected)
