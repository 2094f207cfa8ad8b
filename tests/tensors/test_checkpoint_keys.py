from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.stateful import Stateful

from shardsmith.errors import CheckpointNotFoundError
from shardsmith.formats.by_path import model_names, open_source
from shardsmith.formats.dcp.index import read_index
from shardsmith.tensors.checkpoint_keys import NOT_A_MODEL, find_averages, find_models
from shardsmith.tensors.tensors import read_tensor
from tests.dcp_directories import save

ONE = torch.ones(1)


def saved(state: dict[str, Any], tmp_path: Path) -> dict[str, dict[str, str]]:
    """The models in what torch makes of this state dict."""
    index = read_index(save(state, tmp_path / "dcp"))
    return find_models(index.tensors, index.containers)


def test_flat_keys_are_the_model_and_the_rest_is_not(tmp_path: Path) -> None:
    beside = {name: {"x": ONE} for name in NOT_A_MODEL - {"ema_model"}}
    found = saved({"layers.0.w": ONE, "norm.w": ONE, **beside}, tmp_path)
    assert found == {"main": {"layers.0.w": "layers.0.w", "norm.w": "norm.w"}}


def test_keys_nested_under_model_are_the_model_and_the_rest_is_not(tmp_path: Path) -> None:
    state = {"model": {"layers.0.w": ONE, "norm.w": ONE}, "optimizer": {"state": {"norm.w": ONE}}, "other": ONE}
    assert saved(state, tmp_path) == {"main": {"layers.0.w": "model.layers.0.w", "norm.w": "model.norm.w"}}


def test_a_nested_model_may_be_a_tree(tmp_path: Path) -> None:
    state = {"model": {"layers": {"0": {"w": ONE}}, "list": [ONE, ONE]}}
    found = saved(state, tmp_path)["main"]
    assert found == {"layers.0.w": "model.layers.0.w", "list.0": "model.list.0", "list.1": "model.list.1"}


class AppState(Stateful):
    """As in torch's tutorial of distributed checkpoints."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optim": optimizer}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise NotImplementedError


def test_the_app_state_of_torchs_tutorial_is_read(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    found = saved({"app": AppState(model, optimizer)}, tmp_path)
    assert found == {"main": {"0.weight": "app.model.0.weight", "0.bias": "app.model.0.bias"}}


@pytest.mark.parametrize("prefix", ["ema", "ema_optimizer"])
@pytest.mark.parametrize("suffix", ["", ".0", ".0.999"], ids=["one average", "numbered", "named by its decay"])
def test_the_average_of_torchtitan_is_read(tmp_path: Path, prefix: str, suffix: str) -> None:
    key = f"{prefix}.state.layers.0.w.ema_params{suffix}"
    found = saved({"layers.0.w": ONE, key: ONE, f"{prefix}.state.layers.0.w.step": ONE}, tmp_path)
    assert found == {"main": {"layers.0.w": "layers.0.w"}, "ema": {"layers.0.w": key}}


def test_of_several_averages_the_first_is_read_unless_one_is_chosen(tmp_path: Path) -> None:
    averages = {name: torch.full((2,), float(i)) for i, name in enumerate(["0.999", "0.9999"])}
    keys = {f"ema.state.w.ema_params.{name}": value for name, value in averages.items()}
    directory = save({"w": torch.ones(2) * 7, **keys}, tmp_path / "dcp")
    chosen = {"ema": "0.999", "ema:0.999": "0.999", "ema:0.9999": "0.9999"}
    for model, name in chosen.items():
        source = open_source(directory, model)
        assert source.averages[0] == name
        assert set(source.averages) == averages.keys()
        assert torch.equal(read_tensor(source, "w"), averages[name])
    with pytest.raises(CheckpointNotFoundError, match=r"no average '0\.9'; it holds 0\.999, 0\.9999"):
        open_source(directory, "ema:0.9")


def test_our_average_is_read_beside_a_flat_model(tmp_path: Path) -> None:
    state = {"w": ONE, "ema_model": {"w": ONE}, "ema_state": {"updates": ONE}, "train_state": {"step": ONE}}
    assert saved(state, tmp_path) == {"main": {"w": "w"}, "ema": {"w": "ema_model.w"}}


def test_our_average_is_read_beside_a_nested_model(tmp_path: Path) -> None:
    state = {"model": {"w": ONE}, "ema_model": {"w": ONE}}
    assert saved(state, tmp_path) == {"main": {"w": "model.w"}, "ema": {"w": "ema_model.w"}}


def test_a_flat_model_whose_own_names_begin_with_model_keeps_them(tmp_path: Path) -> None:
    names = ["model.layers.0.w", "model.norm.w", "lm_head.w"]
    found = saved({**dict.fromkeys(names, ONE), "optimizer": {"state": {"model.norm.w": ONE}}}, tmp_path)
    assert found == {"main": {name: name for name in names}}


def test_a_nested_model_whose_own_names_begin_with_model_keeps_them_too(tmp_path: Path) -> None:
    state = {"model": {"model.layers.0.w": ONE, "lm_head.w": ONE}}
    found = saved(state, tmp_path)
    assert found == {"main": {"model.layers.0.w": "model.model.layers.0.w", "lm_head.w": "model.lm_head.w"}}


def test_our_average_of_a_model_whose_names_begin_with_model_keeps_them(tmp_path: Path) -> None:
    state = {"model.norm.w": ONE, "ema_model": {"model.norm.w": ONE}}
    found = saved(state, tmp_path)
    assert found == {"main": {"model.norm.w": "model.norm.w"}, "ema": {"model.norm.w": "ema_model.model.norm.w"}}


@pytest.mark.parametrize("aside", ["optimizer", "optim", "dataloader", "train_state"])
def test_something_called_model_inside_of_something_else_is_no_model(tmp_path: Path, aside: str) -> None:
    assert saved({"w": ONE, aside: {"model": {"w": ONE}}}, tmp_path) == {"main": {"w": "w"}}


def test_a_name_that_only_begins_like_one_set_aside_is_the_models(tmp_path: Path) -> None:
    names = ["optimizer_head.w", "emanate.w", "rng_net.w", "ema_models.w"]
    assert saved(dict.fromkeys(names, ONE), tmp_path) == {"main": {name: name for name in names}}


def test_keys_without_paths_are_flat() -> None:
    assert find_models(["model.w", "b"], {}) == {"main": {"model.w": "model.w", "b": "b"}}


def test_order_is_kept() -> None:
    keys = ["c", "a", "b"]
    assert list(find_models(keys, {})["main"]) == keys


def test_a_checkpoint_without_a_model_has_none(tmp_path: Path) -> None:
    assert saved({"optimizer": {"state": {"w": ONE}}}, tmp_path) == {}


def renamed(value: float, rename: Callable[[str], str] = lambda name: name) -> dict[str, Any]:
    return {rename(name): torch.full((2,), value) for name in ("layers.0.w", "norm.w")}


AVERAGES = {  # what people and libraries call an average -> what is saved of it, the name that it then has
    "ema": (lambda: {"ema": renamed(2)}, "ema"),
    "model_ema": (lambda: {"model_ema": renamed(2)}, "model_ema"),
    "ema_net": (lambda: {"ema_net": renamed(2)}, "ema_net"),
    **{name: (lambda name=name: {name: renamed(2)}, name) for name in ("modelEma", "EmaModel", "EMAModel", "netAvg")},
    "shadow": (lambda: {"ema": {"decay": ONE, "shadow_params": renamed(2)}}, "ema.shadow_params"),
    "torch's AveragedModel": (lambda: {"ema_model": {"n_averaged": ONE, "module": renamed(2)}}, "ema_model"),
    "the same, elsewhere": (lambda: {"swa": {"n_averaged": ONE, "module": renamed(2)}}, "swa"),
    "without dots": (lambda: {"model_ema": renamed(2, lambda name: name.replace(".", ""))}, "model_ema"),
}


@pytest.mark.parametrize("main", [{"model": renamed(1)}, {"model": renamed(1, "model.{}".format)}, renamed(1)])
@pytest.mark.parametrize(("average", "name"), AVERAGES.values(), ids=AVERAGES)
def test_an_average_under_any_key_is_found(
    tmp_path: Path, main: dict[str, Any], average: Callable[[], dict[str, Any]], name: str
) -> None:
    directory = save({**main, **average(), "optimizer": {"state": renamed(9)}}, tmp_path / "dcp")
    for chosen in ("ema", f"ema:{name}", f"ema:{name}.module"):  # with the wrapper that may be in it, too
        source = open_source(directory, chosen)
        assert source.specs.keys() == open_source(directory).specs.keys()
        assert all(torch.equal(read_tensor(source, fqn), torch.full((2,), 2.0)) for fqn in source.specs)
        assert not source.filled
        assert source.averages == (name,)


def test_an_average_inside_of_the_models_own_dict_is_not_part_of_the_model(tmp_path: Path) -> None:
    inner = {**renamed(1, "net.{}".format), **renamed(2, "ema_net.module.{}".format), "ema_net.n_averaged": ONE}
    found = saved({"model": inner}, tmp_path)
    assert list(found["main"]) == ["net.layers.0.w", "net.norm.w"]
    assert found["ema"] == {f"net.{name}": f"model.ema_net.module.{name}" for name in ("layers.0.w", "norm.w")}


@pytest.mark.parametrize("container", ["", "state_dict.", "app.state."])
def test_an_average_whose_names_have_no_dots_is_found_in_any_container(container: str) -> None:
    """As latent diffusion has it: buffers, whose names cannot have any."""
    names = ("diffusion_model.in.0.weight", "diffusion_model.norm.weight")
    main = [f"{container}model.{name}" for name in names]
    average = [f"{container}model_ema.{name.replace('.', '')}" for name in names]
    found = find_models([*main, *average, f"{container}model_ema.decay"], {})
    assert found == {"main": dict(zip(main, main, strict=True)), "ema": dict(zip(main, average, strict=True))}
    assert find_averages([*main, *average], {}) == [f"{container}model_ema"]


@pytest.mark.parametrize("name", ["schema", "poemas", "Remake", "cinema", "SWAP", "remark.shadowing"])
def test_a_word_that_has_the_letters_of_an_average_is_none(name: str) -> None:
    assert (
        find_averages(["model.a.w", "model.b.w", f"{name}.a.w", f"{name}.b.w"], {"model.a.w": ("model", "a.w")}) == []
    )


def test_of_averages_in_several_dicts_the_first_is_read_unless_one_is_chosen(tmp_path: Path) -> None:
    directory = save({"model": renamed(1), "ema": renamed(2), "ema_slow": renamed(3)}, tmp_path / "dcp")
    for chosen, value in {"ema": 2, "ema:ema": 2, "ema:ema_slow": 3}.items():
        assert torch.equal(read_tensor(open_source(directory, chosen), "norm.w"), torch.full((2,), float(value)))
    with pytest.raises(CheckpointNotFoundError, match=r"no average 'other'; it holds ema, ema_slow"):
        open_source(directory, "ema:other")


def test_another_dict_with_the_models_names_is_named_and_can_be_chosen(tmp_path: Path) -> None:
    directory = save({"model": renamed(1), "teacher": renamed(2)}, tmp_path / "dcp")
    assert model_names(directory) == ["main"]
    assert open_source(directory).twins == ("teacher",)
    assert torch.equal(read_tensor(open_source(directory, "ema:teacher"), "norm.w"), torch.full((2,), 2.0))


def test_what_is_called_an_average_and_holds_other_names_is_none(tmp_path: Path) -> None:
    state = {"model": {**renamed(1), "codebook.ema_count": ONE}, "moving_avg": {"loss": ONE}}
    assert list(saved(state, tmp_path)) == ["main"]


def test_an_average_in_a_file_of_torch_is_found_too(tmp_path: Path) -> None:
    file = tmp_path / "last.pt"
    torch.save({"state_dict": renamed(1), "model_ema": renamed(2)}, file)
    assert model_names(file) == ["main", "ema"]
    assert torch.equal(read_tensor(open_source(file, "ema"), "norm.w"), torch.full((2,), 2.0))
