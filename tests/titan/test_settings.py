"""The trainer's own config against that of the model whose weights it loads."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedConfig, Qwen3Config, Qwen3MoeConfig

from shardsmith.cli import main
from shardsmith.integrations.torchtitan.models import build_titan_model
from shardsmith.integrations.torchtitan.names import TorchTitanNames
from shardsmith.integrations.torchtitan.rope import Reference
from shardsmith.integrations.torchtitan.settings import Source, compare_settings
from shardsmith.load.faults import LoadFault
from shardsmith.load.live_weights import LiveWeights
from tests.titan import small_models
from tests.titan.cpu import IS_0_3
from tests.titan.evaluation import FLOAT32
from tests.titan.hf_models import DEEPSEEK, MODELS, QWEN, make_model
from tests.titan.jobs import LLAMA, Assets, Job, error_of, log_of, run_jobs

CONFIGS: dict[str, PreTrainedConfig] = {
    f"llama3/{small_models.DENSE}": LLAMA,
    f"qwen3/{small_models.DENSE}": Qwen3Config(**QWEN, tie_word_embeddings=False),
    f"qwen3/{small_models.MOE}": Qwen3MoeConfig(
        **QWEN,
        tie_word_embeddings=False,
        num_experts=small_models.EXPERTS,
        num_experts_per_tok=small_models.CHOSEN,
        moe_intermediate_size=small_models.WIDTH,
        norm_topk_prob=True,
    ),
    f"deepseek_v3/{small_models.DENSE}": DEEPSEEK,
}
ROPE: dict[str, dict[str, Any]] = {
    "rope_theta": {"rope_theta": 12345.0},
    "rope_type": {"rope_type": "linear", "factor": 2.0},
}
MSCALES = ("mscale", "mscale_all_dim")
OTHERS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    f"llama3/{small_models.DENSE}": [
        *(("rms_norm_eps", {"rms_norm_eps": eps}) for eps in (1e-6, 0.0)),
        ("num_attention_heads", {"num_attention_heads": 8, "num_key_value_heads": 8}),
        ("num_key_value_heads", {"num_key_value_heads": 4}),
        ("tie_word_embeddings", {"tie_word_embeddings": True}),
        *((name, {"rope_parameters": {**LLAMA.rope_parameters, **changed}}) for name, changed in ROPE.items()),
        ("rope_factor", {"rope_parameters": {**LLAMA.rope_parameters, "factor": 32.0}}),
        ("hidden_act", {"hidden_act": "gelu"}),
        ("sliding_window", {"model_type": "mistral", "sliding_window": 64}),
        *(("model_type", {"model_type": kind}) for kind in ("granite", "helium", "gemma")),
    ],
    f"qwen3/{small_models.DENSE}": [
        ("rms_norm_eps", {"rms_norm_eps": 1e-5}),
        ("head_dim", {"head_dim": 64}),
        ("tie_word_embeddings", {"tie_word_embeddings": True}),
        ("rope_theta", {"rope_parameters": {**QWEN["rope_parameters"], "rope_theta": 10000.0}}),
        ("hidden_act", {"hidden_act": "relu"}),
        ("layer_types", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0, "layer_types": None}),
    ],
    f"qwen3/{small_models.MOE}": [
        ("num_experts_per_tok", {"num_experts_per_tok": 4}),
        ("norm_topk_prob", {"norm_topk_prob": False}),
        ("hidden_act", {"hidden_act": "gelu"}),
    ],
    f"deepseek_v3/{small_models.DENSE}": [
        ("routed_scaling_factor", {"routed_scaling_factor": 1.0}),
        ("scoring_func", {"scoring_func": "softmax"}),
        ("norm_topk_prob", {"norm_topk_prob": False}),
        ("n_group", {"n_group": 4, "topk_group": 2}),
        ("rope_factor", {"rope_parameters": {**DEEPSEEK.rope_parameters, "factor": 10.0}}),
        ("rope_mscale", {"rope_parameters": {**DEEPSEEK.rope_parameters, "mscale": 0.5, "mscale_all_dim": 0.5}}),
        *(("rope_mscale", {"rope_parameters": {**DEEPSEEK.rope_parameters, name: 2.8}}) for name in MSCALES),
        ("rope_interleave", {"rope_interleave": False}),
    ],
}


@pytest.fixture(scope="module", params=CONFIGS)
def title(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def live(title: str) -> tuple[LiveWeights, TorchTitanNames]:
    """A model of TorchTitan as its flavor makes it, and its names in Hugging Face."""
    made = build_titan_model(title)
    if hasattr(made.config, "original_seq_len"):  # 0.2 computes without YaRN for sequences that are not longer
        made.config.max_seq_len = 2 * made.config.original_seq_len
    return LiveWeights(made.make()), TorchTitanNames(made.adapter, ())


def faults(live: tuple[LiveWeights, TorchTitanNames], config: dict[str, Any], *allowed: str) -> list[LoadFault]:
    return compare_settings(live[0], Source.of(config, "config.json"), live[1], allowed)


def test_a_model_that_computes_what_its_config_says_has_no_fault(title: str, live: Any) -> None:
    assert faults(live, CONFIGS[title].to_dict()) == []


def test_each_setting_that_differs_is_named_with_both_values(title: str, live: Any) -> None:
    for name, changed in OTHERS[title]:
        found = faults(live, {**CONFIGS[title].to_dict(), **changed})
        assert name in [fault.name for fault in found], changed
        assert all("in config.json" in fault.problem for fault in found)
        assert faults(live, {**CONFIGS[title].to_dict(), **changed}, *(fault.name for fault in found)) == []


@pytest.mark.parametrize("window", [None, 1 << 20])
def test_another_class_that_computes_the_same_is_no_fault(window: int | None) -> None:
    """Mistral does, without a window or with one that is longer than any sequence of the run."""
    made = build_titan_model(f"llama3/{small_models.DENSE}")
    mistral = {**LLAMA.to_dict(), "model_type": "mistral", "sliding_window": window}
    assert faults((LiveWeights(made.make()), TorchTitanNames(made.adapter, ())), mistral) == []


LIVE = {"score_before_experts": True, "_debug_force_load_balance": True, "top_k": 4}
"""Attributes of TorchTitan's modules, and values that change what experts compute."""


@pytest.mark.parametrize("attribute", LIVE)
def test_what_experts_compute_otherwise_is_named(
    title: str, live: Any, attribute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each module that has it: in 0.3 what hands tokens to experts has a number of its own."""
    modules = [module for part in live[0].parts for module in part.modules()]
    # 0.3's dispatchers are no modules.
    dispatchers = [module.token_dispatcher for module in modules if hasattr(module, "token_dispatcher")]
    holders = [module for module in (*modules, *dispatchers) if hasattr(module, attribute)]
    assert attribute != "top_k" or len(dispatchers) == (len(holders) // 2 if IS_0_3 else 0)
    for holder in holders:
        with monkeypatch.context() as changed:
            changed.setattr(holder, attribute, LIVE[attribute])
            assert len(faults(live, CONFIGS[title].to_dict())) == 1
    assert holders or "moe" not in title or (IS_0_3 and attribute == "score_before_experts")


@pytest.mark.skipif(not IS_0_3, reason="0.2 has one kind of rotary table for each model")
def test_a_table_that_turns_other_pairs_is_named(title: str) -> None:
    """0.3 has two classes, which have the same settings and angles."""
    from torchtitan.models.common.rope import ComplexRoPE, CosSinRoPE

    made, config = build_titan_model(title), CONFIGS[title].to_dict()
    for layer in made.config.layers:
        rope = layer.attention.rope
        other = CosSinRoPE if type(rope) is ComplexRoPE.Config else ComplexRoPE
        layer.attention.rope = other.Config(dim=rope.dim, max_seq_len=rope.max_seq_len, theta=rope.theta)
        # Llama's own scaling is in one of the two classes only.
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": rope.theta}
    found = faults((LiveWeights(made.make()), TorchTitanNames(made.adapter, ())), config)
    assert [fault.name for fault in found] == ["rope_interleave"]
    assert "neighbours in a head" in found[0].problem


@pytest.mark.parametrize(("window", "name"), [((7, 0), "sliding_window"), ((-1, -1), "is_causal"), ((-1, 0), None)])
def test_a_window_of_the_trainer_alone_is_named(
    title: str, live: Any, window: tuple[int, int], name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As 0.3's VarlenAttention has it."""
    holder = next(m for part in live[0].parts for n, m in part.named_modules() if n.endswith("inner_attention"))
    monkeypatch.setattr(holder, "window_size", window, raising=False)
    assert [fault.name for fault in faults(live, CONFIGS[title].to_dict())] == ([name] if name else [])


def test_the_window_of_gpt_oss_is_compared() -> None:
    title = f"gpt_oss/{small_models.DENSE}"
    made, config = build_titan_model(title), MODELS[title]().to_dict()
    live = LiveWeights(made.make()), TorchTitanNames(made.adapter, ())
    before = [fault.name for fault in faults(live, config)]
    assert "sliding_window" not in before
    assert [fault.name for fault in faults(live, {**config, "sliding_window": 64})] == ["sliding_window", *before]


def test_the_random_numbers_of_the_run_stay_as_they_are(title: str, live: Any) -> None:
    before = torch.random.get_rng_state()
    faults(live, CONFIGS[title].to_dict())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_tables_of_the_reference_are_those_of_the_config(title: str, live: Any) -> None:
    rope = Source.of(CONFIGS[title].to_dict(), "config.json").rope
    assert rope is not None
    reference = LiveWeights(Reference(build_titan_model(title).make, rope, "config.json")())
    other = LiveWeights(build_titan_model(title).make()) if not title.startswith("deepseek") else live[0]
    for name, table in other.transient().items():
        right = reference.transient()[name]
        torch.testing.assert_close(right[:32], table[:32], atol=1e-5, rtol=1e-5)


def test_a_table_that_no_setting_explains_is_a_fault(title: str, live: Any) -> None:
    with torch.no_grad():
        for table in live[0].transient().values():
            table[1] = table[2]
    try:
        (fault,) = faults(live, CONFIGS[title].to_dict())
        assert (fault.code, fault.name) == ("rope-differs", "rope_parameters")
    finally:
        for table in live[0].transient().values():
            table[1] = table[0]  # the models of other tests are others


@pytest.fixture(scope="module")
def jobs(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """Runs that start from a model by both ways, with settings of their own. Read only."""
    root = tmp_path_factory.mktemp("settings")
    hf, dcp = root / "hf", root / "dcp"
    make_model(LLAMA, hf)
    for file in assets.hf.glob("tokenizer*"):
        (hf / file.name).write_bytes(file.read_bytes())
    names = ["--layout", "torchtitan", "--titan_model", "llama3", "--titan_flavor", small_models.DENSE]
    assert main(["to-dcp", "--model", str(hf), "--checkpoint", str(dcp), *names, "--quiet"]) == 0
    jobs = {}
    for flavor in ("of_another_theta", "of_another_eps"):
        choice = f"--config=llama3_{flavor}" if IS_0_3 else f"--model.flavor={flavor}"
        for way, source in {"to-dcp": [dcp], "in hf": [hf, "--checkpoint.initial_load_in_hf"]}.items():
            options = [choice, "--training.steps=1", f"--checkpoint.initial_load_path={source[0]}", *source[1:]]
            jobs[f"{flavor} {way}"] = Job(run=root / f"{flavor} {way}", options=options, hooks={"prove_load": True})
    allowed = jobs["of_another_theta to-dcp"]
    jobs["allowed"] = dataclasses.replace(allowed, run=root / "allowed", hooks={"allow_config": ["rope_*"]})
    run_jobs(assets, 2, root, *jobs.values())
    return jobs


@pytest.mark.parametrize("way", ["to-dcp", "in hf"])
@pytest.mark.parametrize(
    ("flavor", "words"),
    [
        ("of_another_theta", ["rope_theta: 10000.0 in the trainer", "500000.0 in", "[rope-differs]"]),
        ("of_another_eps", ["rms_norm_eps: 0.1 in the trainer", "1e-05 in", "[norm-eps-differs]"]),
    ],
)
def test_a_trainer_that_computes_otherwise_does_not_start(
    jobs: dict[str, Job], flavor: str, words: list[str], way: str
) -> None:
    error = error_of(jobs[f"{flavor} {way}"])
    assert error.startswith("InitialLoadError")
    assert all(word in error for word in words)
    assert "allow_config=[" in error
    assert "loss:" not in log_of(jobs[f"{flavor} {way}"])


def test_it_starts_where_that_is_allowed_by_name(jobs: dict[str, Job]) -> None:
    assert error_of(jobs["allowed"]) == ""
    assert "elements) equal those of" in log_of(jobs["allowed"])


@pytest.mark.skipif(IS_0_3, reason="0.3 does not leave it out; test_table.py has its start")
def test_deepseek_whose_yarn_0_2_leaves_out_does_not_start(assets: Assets, tmp_path: Path) -> None:
    """It does where sequences are as short as these."""
    hf, dcp = tmp_path / "hf", tmp_path / "dcp"
    make_model(DEEPSEEK, hf)
    names = ["--layout", "torchtitan", "--titan_model", "deepseek_v3", "--titan_flavor", small_models.DENSE]
    assert main(["to-dcp", "--model", str(hf), "--checkpoint", str(dcp), *names, "--quiet"]) == 0
    choice = ["--model.name=deepseek_v3", f"--model.flavor={small_models.DENSE}"]
    options = [*choice, *FLOAT32, "--training.steps=1", f"--checkpoint.initial_load_path={dcp}"]
    job = Job(run=tmp_path / "run", options=options, hooks={"prove_load": True})
    run_jobs(assets, 2, tmp_path, job)
    assert "rope_type: default in the trainer" in error_of(job)
    assert "leaves YaRN out while training.seq_len (32)" in error_of(job)
