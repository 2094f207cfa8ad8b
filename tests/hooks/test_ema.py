"""The average against an independent formula, on one process and on real ranks, and its way through a checkpoint.

No model is trained here: ``set_weights(model, step)`` makes the weights what they are to be at that step, the same ones
however the model is sharded.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from shardsmith.errors import UsageError
from shardsmith.hooks import Hooks, ShardedSave, every
from shardsmith.hooks.ema import EMA
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

OPTIONS = {"decay": 0.9, "warmup": True}


class Net(nn.Module):
    """On two ranks the weights of 3 and 1 rows are cut unevenly, on four the one of 3 leaves a rank empty."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 5, bias=False))
        self.out = nn.Linear(5, 1)
        self.frozen = nn.Linear(5, 1)
        self.frozen.requires_grad_(False)
        self.register_buffer("mean", torch.zeros(5))
        self.body[1].weight = nn.Parameter(torch.zeros(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(x) - self.mean) + self.frozen(x)


AVERAGED = ["body.0.weight", "body.0.bias", "body.1.weight", "out.weight", "out.bias"]


def weights_at(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.rand(value.shape, generator=generator) for name, value in Net().state_dict().items()}


def set_weights(model: nn.Module, step: int) -> None:
    set_model_state_dict(model, weights_at(step), options=StateDictOptions(full_state_dict=True))


def average_over(ema: EMA, model: nn.Module, steps: range) -> EMA:
    for step in steps:
        set_weights(model, step)
        ema.on_optimizer_step(step)
    return ema


def uninterrupted(steps: int) -> EMA:
    """What a single process without sharding gets from step 1 to ``steps``, having started from step 0."""
    model = Net()
    set_weights(model, 0)
    return average_over(EMA(model, **OPTIONS), model, range(1, steps + 1))


def loaded(path: Path) -> EMA:
    ema = EMA(Net(), **OPTIONS)
    dcp.load({"ema": ema}, checkpoint_id=path)
    return ema


def assert_same(ema: EMA, other: EMA) -> None:
    ours, theirs = ema.model_state_dict(), other.model_state_dict()
    assert ours.keys() == theirs.keys()
    assert ema.updates == other.updates
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0)


def formula(history: list[Tensor], decays: list[float]) -> Tensor:
    """The weighted sum that the recursion stands for, in float64; ``decays[i]`` is for ``history[i]``."""
    total = torch.zeros_like(history[0], dtype=torch.float64)
    for i, weight in enumerate(history):
        share = 1 - decays[i]
        for later in decays[i + 1 :]:
            share *= later
        total += share * weight.double()
    return total


@pytest.mark.parametrize(
    ("options", "steps", "decays"),
    [
        # the weights at these steps come in, step 0 as the start
        ({}, [0, 1, 2, 3, 4, 5, 6, 7, 8], [0, *[0.9] * 8]),
        ({"warmup": True}, range(9), [0, *[min(0.9, (1 + t) / (10 + t)) for t in range(8)]]),
        ({"warmup": True, "decay": 0.3}, range(9), [0, 0.1, 2 / 11, 3 / 12, 0.3, 0.3, 0.3, 0.3, 0.3]),
        ({"every_n_steps": 3}, [0, 3, 6], [0, 0.9, 0.9]),
        ({"start_step": 4}, [4, 5, 6, 7, 8], [0, *[0.9] * 4]),
        ({"start_step": 3, "every_n_steps": 2, "warmup": True}, [4, 6, 8], [0, 2 / 11, 3 / 12]),
    ],
    ids=str,
)
def test_average_is_the_weighted_sum(options: dict[str, Any], steps: list[int], decays: list[float]) -> None:
    model = Net()
    set_weights(model, 0)
    ema = average_over(EMA(model, **{"decay": 0.9, **options}), model, range(1, 9))
    for name, average in ema.model_state_dict().items():
        expected = formula([weights_at(step)[name] for step in steps], decays)
        torch.testing.assert_close(average.double(), expected, rtol=0, atol=1e-6)
    assert ema.updates == len(steps) - ("start_step" not in options)


def test_half_precision_weights_move_a_float32_average() -> None:
    model = nn.Linear(64, 64, dtype=torch.bfloat16)
    ema = EMA(model, decay=0.9999)
    history = [model.weight.detach().clone()]
    for _ in range(20):
        nn.init.normal_(model.weight)
        history.append(model.weight.detach().clone())
        ema.update()
    average = ema.model_state_dict()["weight"]
    assert average.dtype == torch.float32
    torch.testing.assert_close(average.double(), formula(history, [0, *[0.9999] * 20]), rtol=0, atol=1e-6)


def test_only_trainable_floating_point_weights_are_averaged_and_tied_ones_once() -> None:
    model = Net()
    assert list(EMA(model).model_state_dict()) == AVERAGED
    model.body[1].weight = model.body[0].weight
    assert "body.1.weight" not in EMA(model).model_state_dict()


def test_compile_and_activation_checkpointing_change_no_name() -> None:
    model = Net()
    model.body[0] = checkpoint_wrapper(model.body[0])
    assert list(EMA(torch.compile(model)).model_state_dict()) == AVERAGED


class Operations(TorchDispatchMode):
    """Collects the names of the operations that run, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_an_update_in_float32_is_one_operation_in_place() -> None:
    ema = EMA(Net())
    with Operations() as ran:
        ema.update()
    assert ran.names == ["aten::_foreach_lerp_.Scalar"]


def test_until_it_starts_the_average_is_a_copy_of_the_weights() -> None:
    model = Net()
    ema = average_over(EMA(model, start_step=5), model, range(1, 4))
    for name, average in ema.model_state_dict().items():
        assert torch.equal(average, weights_at(3)[name])


def test_training_begins_with_the_weights_of_that_moment_unless_an_average_was_loaded() -> None:
    model = Net()
    ema = EMA(model)
    set_weights(model, 7)
    ema.on_train_begin(7)
    assert torch.equal(ema.model_state_dict()["out.weight"], weights_at(7)["out.weight"])
    ema.load_state_dict(EMA(Net()).state_dict())
    ema.on_train_begin(7)
    assert not torch.equal(ema.model_state_dict()["out.weight"], weights_at(7)["out.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swapping_gives_the_weights_back_bit_for_bit_after_an_exception_too(dtype: torch.dtype) -> None:
    model = nn.Linear(3, 1, dtype=dtype)
    ema = EMA(model)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-0.0, float("nan"), 1e-40]]))
    bits = model.weight.detach().clone().view(torch.uint8)
    with ema.swapped_in():
        assert ema.is_swapped_in
        assert torch.equal(model.weight, ema.model_state_dict()["weight"].to(dtype))
    assert torch.equal(model.weight.detach().view(torch.uint8), bits)
    with pytest.raises(KeyboardInterrupt), ema.swapped_in():
        raise KeyboardInterrupt
    assert torch.equal(model.weight.detach().view(torch.uint8), bits)
    assert not ema.is_swapped_in


def test_what_would_mix_up_weights_and_average_is_refused() -> None:
    ema = EMA(Net())
    with ema.swapped_in():
        for enter in (ema.swapped_in, ema.staging):
            with pytest.raises(UsageError, match="swapped in: leave"), enter():
                pass
        for call in (ema.update, ema.reset, lambda: ema.load_state_dict(ema.state_dict())):
            with pytest.raises(UsageError, match="swapped in: leave"):
                call()
    with ema.staging(), ema.staging():
        with pytest.raises(UsageError, match="copies the state"), ema.swapped_in():
            pass
        with pytest.raises(UsageError, match="copies the state"):
            ema.update()
    ema.update()
    assert ema.updates == 1


@pytest.mark.parametrize(
    "options", [{"decay": 1.0}, {"decay": -0.1}, {"decay": float("nan")}, {"start_step": -1}, {"every_n_steps": 0}]
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        EMA(Net(), **options)


def test_models_that_cannot_be_averaged_are_refused() -> None:
    with pytest.raises(UsageError, match="nothing to average"):
        EMA(Net().requires_grad_(False))
    with torch.device("meta"), pytest.raises(UsageError, match="on the meta device, or lazy"):
        EMA(Net())


def test_parameters_replaced_behind_its_back_are_noticed() -> None:
    model = Net()
    ema = EMA(model)
    model.out.weight = nn.Parameter(torch.zeros(1, 5))
    with pytest.raises(UsageError, match=r"out\.weight is no longer the parameter"):
        ema.update()


def test_another_decay_is_loaded_only_on_demand() -> None:
    saved = uninterrupted(3).state_dict()
    ema = EMA(Net(), decay=0.5)
    with pytest.raises(UsageError, match=r"decay 0\.9, this one 0\.5: .* allow_other_decay"):
        ema.load_state_dict(saved)
    assert ema.updates == 0
    ema.load_state_dict(saved, allow_other_decay=True)
    assert_same(ema, uninterrupted(3))


def test_an_average_of_another_model_is_refused_with_all_differences() -> None:
    saved = EMA(Net()).state_dict()
    saved["model"]["out.weight"] = torch.zeros(2, 5)
    saved["model"]["extra"] = saved["model"].pop("out.bias")
    with pytest.raises(UsageError) as error:
        EMA(Net()).load_state_dict(saved)
    assert [line.split(":")[0].strip() for line in str(error.value).splitlines()[1:4]] == [
        "extra",
        "out.bias",
        "out.weight",
    ]


def test_facts_say_how_the_average_was_made() -> None:
    facts = {"decay": 0.9, "warmup": True, "start_step": 0, "every_n_steps": 1, "updates": 4}
    assert uninterrupted(4).facts() == facts


def sharded(kind: str) -> nn.Module:
    """The net on all ranks, its body wrapped on its own, so that FSDP keeps the gathered root after a forward."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = Net()
    if kind == "fsdp2":
        fully_shard(model.body, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    if kind == "ddp":
        return DistributedDataParallel(model)
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({nn.Sequential}),
        use_orig_params=True,
        device_id=torch.device("cpu"),
        # the mesh decides which kind of sharded tensor its state dict holds
        device_mesh=mesh if kind == "fsdp1-dtensor" else None,
        sharding_strategy=ShardingStrategy.NO_SHARD if kind == "fsdp1-no-shard" else None,
    )


def evaluate(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.ones(2, 5))


def run_average_and_save(path: Path, kinds: list[str]) -> None:
    for kind in kinds:
        model = sharded(kind)
        set_weights(model, 0)
        evaluate(model)  # FSDP starts up; the root stays gathered
        ema = average_over(EMA(model, offload=kind == "ddp", **OPTIONS), model, range(1, 5))
        before = evaluate(model)
        with ema.swapped_in():
            average = evaluate(model)
        assert torch.equal(evaluate(model), before)
        torch.testing.assert_close(average, average_of_net(4))
        dcp.save({"ema": ema}, checkpoint_id=path / kind)
        assert torch.equal(evaluate(model), before)
        again = EMA(model, **OPTIONS)
        again.load_state_dict(ema.state_dict())
        assert again.updates == ema.updates
        dcp.save({"ema": again}, checkpoint_id=path / f"{kind}-again")
    gc.collect()  # FSDP1 modules are cycles that hold the process group; Gloo aborts if they live until exit


def average_of_net(steps: int) -> Tensor:
    """What the net with the averaged weights, and all else as at the last step, makes of ones."""
    model = Net()
    model.load_state_dict({**weights_at(steps), **uninterrupted(steps).model_state_dict()})
    return evaluate(model)


@pytest.mark.parametrize("kinds", [["fsdp2", "ddp"], ["fsdp1", "fsdp1-dtensor", "fsdp1-no-shard"]], ids=str)
def test_however_it_is_sharded_the_average_is_that_of_one_process(kinds: list[str], tmp_path: Path) -> None:
    run_on_ranks(run_average_and_save, 2, tmp_path, tmp_path, kinds)
    for kind in kinds:
        assert_same(loaded(tmp_path / kind), uninterrupted(4))
        assert_same(loaded(tmp_path / f"{kind}-again"), uninterrupted(4))


def run_go_on(path: Path, kinds: list[str]) -> None:
    for kind in kinds:
        model = sharded(kind)
        ema = EMA(model, **OPTIONS)
        dcp.load({"ema": ema}, checkpoint_id=path / "start")
        ema.on_train_begin(4)
        average_over(ema, model, range(5, 9))
        dcp.save({"ema": ema}, checkpoint_id=path / kind)
    gc.collect()  # as above


def test_resumed_on_other_ranks_it_goes_on_as_if_uninterrupted(tmp_path: Path) -> None:
    dcp.save({"ema": uninterrupted(4)}, checkpoint_id=tmp_path / "start")
    run_on_ranks(run_go_on, 4, tmp_path, tmp_path, ["fsdp2", "fsdp1"])
    for kind in ["fsdp2", "fsdp1"]:
        assert_same(loaded(tmp_path / kind), uninterrupted(8))


def run_tied_and_ignored() -> None:
    model = nn.Sequential(*(nn.Linear(5, 5, bias=False) for _ in range(3)))
    model[1].weight = model[0].weight
    ignored = model[2]
    model = FullyShardedDataParallel(
        model, use_orig_params=True, device_id=torch.device("cpu"), ignored_modules=[ignored]
    )
    start = evaluate(model)
    ema = EMA(model)
    model.load_state_dict({f"{i}.weight": torch.zeros(5, 5) for i in range(3)})
    other = EMA(model)
    other.load_state_dict(ema.state_dict())
    with other.swapped_in():
        assert torch.equal(evaluate(model), start)
    assert not evaluate(model).any()


def run_shards() -> None:
    model = sharded("fsdp2")
    state = EMA(model, offload=True).model_state_dict()
    for name, live in get_model_state_dict(model).items():
        if name in AVERAGED:
            assert isinstance(state[name], DTensor)
            assert state[name].placements == live.placements
            assert torch.equal(state[name].to_local(), live.to_local())
    early = Net()
    ema = EMA(early)
    fully_shard(early)
    with pytest.raises(UsageError, match="build EMA after sharding"):
        ema.update()
    with pytest.raises(UsageError, match=r"_flat_param is a flat parameter .* use_orig_params=True"):
        EMA(FullyShardedDataParallel(nn.Linear(5, 3), device_id=torch.device("cpu")))
    half = FullyShardedDataParallel(nn.Linear(5, 3).bfloat16(), use_orig_params=True, device_id=torch.device("cpu"))
    with pytest.raises(UsageError, match=r"bfloat16: .* would round it"):
        EMA(half)


def run_shards_and_collect() -> None:
    run_shards()
    run_tied_and_ignored()
    gc.collect()  # as above


def test_sharded_like_the_weights_with_ties_kept_and_wrong_wraps_refused(tmp_path: Path) -> None:
    run_on_ranks(run_shards_and_collect, 2, tmp_path)


def test_what_trains_later_and_has_no_average_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    ema = EMA(model, decay=0.5)
    with Hooks(ema, ShardedSave(tmp_path, model=model, ema=ema, when=every(1))) as hooks:
        hooks.step(1)
        assert "after EMA was made" not in caplog.text
        model[0].requires_grad_(True)
        for step in (2, 3):
            hooks.step(step)
    told = [message for message in caplog.messages if "after EMA was made" in message]
    assert len(told) == 1
    assert told[0].startswith("0.weight was added, or unfrozen, after EMA was made; 0.bias was added, or unfrozen")
    assert told[0].endswith("A save or an export of the average has the weights of it as they are")
