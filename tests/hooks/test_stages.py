"""A model of which each rank has a stage of a pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from shardsmith.errors import RankFailedError
from shardsmith.ground.ranks import Ranks
from shardsmith.hooks import EMA, HFExport, Hooks, last
from shardsmith.hooks.stages import are_stages, names_on_all
from tests.ranks import run_on_ranks

STAGES = ("first", "second")


def stage(rank: int) -> nn.Module:
    """With a buffer, of which there is no average."""
    torch.manual_seed(rank)
    model = nn.ModuleDict({STAGES[rank]: nn.Linear(3, 2)})
    model[STAGES[rank]].register_buffer("count", torch.tensor(7.0 + rank))
    return model


def run_pipeline(directory: Path) -> None:
    model = stage(dist.get_rank())
    ema = EMA(model, decay=0.5)
    export = HFExport(directory, model=model, ema=ema, when=last(), dtype="original", stages=True)
    with Hooks(ema, export) as hooks:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(2)
        hooks.step(1)


def test_the_live_weights_of_all_stages_are_in_one_directory(tmp_path: Path) -> None:
    run_on_ranks(run_pipeline, 2, tmp_path, tmp_path / "hf")
    started = {name: value for rank in range(2) for name, value in stage(rank).state_dict().items()}
    found = {stem: load_file(tmp_path / "hf" / "step-1" / f"{stem}.safetensors") for stem in ("model", "ema")}
    assert found["model"].keys() == found["ema"].keys() == started.keys()
    for name, value in started.items():
        trains = not name.endswith("count")
        assert torch.equal(found["model"][name], value + 2 * trains)
        torch.testing.assert_close(found["ema"][name], value + 1 * trains)
    origin = json.loads((tmp_path / "hf" / "step-1" / "shardsmith.json").read_text())
    assert origin["step"] == 1


def run_unlike_stages(directory: Path) -> None:
    model = nn.Linear(3, 2 + dist.get_rank(), bias=False)
    with pytest.raises(RankFailedError, match=r"other shapes or dtypes: weight"):
        HFExport(directory, model=model, when=last(), stages=True)


def test_stages_that_call_different_tensors_the_same_are_refused(tmp_path: Path) -> None:
    run_on_ranks(run_unlike_stages, 2, tmp_path, tmp_path / "hf")
    assert list((tmp_path / "hf").iterdir()) == []


def ask_for_stages(differ: bool) -> None:
    model = nn.Module()
    for number in range(5_000):  # together their names have 5 MB, and one value in the store 4 MiB at most
        model.register_parameter(f"{'deep' * 250}_{number}", nn.Parameter(torch.empty(0)))
    if differ and dist.get_rank():
        model.register_parameter("only_here", nn.Parameter(torch.empty(0)))
    assert are_stages(Ranks(60), model) is differ


@pytest.mark.parametrize("differ", [True, False])
def test_stages_are_found_among_any_number_of_names(differ: bool, tmp_path: Path) -> None:
    run_on_ranks(ask_for_stages, 2, tmp_path, differ)


def send_names() -> None:
    rank = dist.get_rank()
    ranks = Ranks(60)
    sent = []
    put = Ranks._put

    def counted(self: Ranks, key: str, outcome: Any) -> list[str]:
        sent.append(len(outcome.encode()))
        return put(self, key, outcome)

    Ranks._put = counted  # type: ignore[method-assign]
    names = [f"stage {rank % 2}, name {number}" for number in range(10_000)]
    own = [f"rank {rank}"] if rank == 5 else []
    found = names_on_all(ranks, names + own)
    assert found == [f"stage {stage}, name {number}" for stage in range(2) for number in range(10_000)] + ["rank 5"]
    # Rank 5 is not like the others of its stage. Rank 0 also sends what was found.
    assert (sum(sent) > 100_000) is (rank in (0, 1, 5)), sent


def test_one_rank_of_each_stage_sends_its_names(tmp_path: Path) -> None:
    run_on_ranks(send_names, 6, tmp_path)
