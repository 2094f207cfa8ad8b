"""Values that stand in another order in the files come out right from any shards, live and from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from shardsmith.formats.models import TranslatedModel, open_dcp_model
from shardsmith.hooks import HFExport, ShardedSave, every
from shardsmith.name_maps.slices import Joined, Slice, Target
from shardsmith.tensors.tensors import TensorSpec, read_tensor
from tests.ranks import run_on_ranks


class Rearranged:
    """Heads whose halves are pairs in memory, gate and up row by row in turn, a convolution for a linear layer, and two
    linear layers that are one.
    """

    def targets(self, specs: Mapping[str, TensorSpec]) -> dict[str, Target]:
        found: dict[str, Target] = {}
        for name, spec in specs.items():
            whole = Slice.whole(spec)
            if name == "q.weight":
                found[name] = whole.reshape(4, 3, 2, 5).transpose(1, 2).reshape(24, 5)
            elif name == "gate_up.weight":
                found |= {"gate.weight": whole[::2], "up.weight": whole[1::2]}
            elif name == "patch.weight":
                found[name] = whole.permute(0, 2, 3, 1).reshape(whole.shape[0], -1)
            elif name.endswith(".weight"):
                found["kv.weight"] = Joined(tuple(Slice.whole(specs[f"{part}.weight"]) for part in "kv"), 1)
            else:
                found[name] = whole
        return found


class Model(nn.Module):
    """Has one layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q = nn.Linear(5, 24, bias=False)
        self.gate_up = nn.Linear(5, 14)
        self.patch = nn.Conv2d(3, 7, 2)
        self.k = nn.Linear(5, 4, bias=False)
        self.v = nn.Linear(3, 4, bias=False)


def expected() -> dict[str, Tensor]:
    weights = {name: value.detach() for name, value in Model().state_dict().items()}
    pair = weights.pop("gate_up.weight")
    patch = weights["patch.weight"].permute(0, 2, 3, 1).reshape(7, 12)
    query = weights["q.weight"].view(4, 3, 2, 5).transpose(1, 2).reshape(24, 5)
    weights["kv.weight"] = torch.cat([weights.pop("k.weight"), weights.pop("v.weight")], dim=1)
    return {**weights, "q.weight": query, "patch.weight": patch, "gate.weight": pair[::2], "up.weight": pair[1::2]}


def place(parameter: nn.Parameter) -> Shard | None:
    """Cut the convolution along its channels, which are what changes fastest in the linear layer."""
    return Shard(1) if parameter.dim() == 4 and dist.get_world_size() == 3 else None


def run_export(directory: Path) -> None:
    model = fully_shard(Model(), shard_placement_fn=place)
    options = {"when": every(1), "dtype": "original", "names": Rearranged()}
    export = HFExport(directory / "hf", model=model, **options)
    alone = HFExport(directory / "alone", model=model, write_mode="files", **options)
    save = ShardedSave(directory / "checkpoints", model=model, when=every(1))
    for hook in (export, alone, save):
        hook.on_step_end(1)
        hook.close()


def assert_expected(found: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected().keys()
    assert all(torch.equal(found[name], value) for name, value in expected().items())


def test_on_any_number_of_ranks_and_from_their_checkpoint(tmp_path: Path) -> None:
    for ranks in (2, 3):
        run_on_ranks(run_export, ranks, tmp_path, tmp_path / str(ranks))
        for export in ("hf", "alone"):
            assert_expected(load_file(tmp_path / str(ranks) / export / "step-1" / "model.safetensors"))
        model = TranslatedModel(open_dcp_model(tmp_path / str(ranks) / "checkpoints" / "step-1"), Rearranged())
        assert_expected({name: read_tensor(model, name) for name in model.specs})
