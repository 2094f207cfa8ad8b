"""Code that a model comes with goes where the model goes: the export loads as the library's own save does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from shardsmith.errors import MismatchError
from shardsmith.hf.model_code import code_beside, named_code
from tests.hf.test_directory_check import export_live, llama, saved, to_hf

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("dynamic_modules")]
CONFIG = """
from transformers import PretrainedConfig


class OwnConfig(PretrainedConfig):
    model_type = "own-of-a-test"

    def __init__(self, width=4, **more):
        self.width = width
        super().__init__(**more)
"""
PARTS = """
from torch import nn


class Part(nn.Linear):
    pass
"""
MODEL = """
import torch
from transformers import PreTrainedModel

from .configuration_own import OwnConfig
from .parts_own import Part


class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.part = Part(config.width, 3)
        self.post_init()

    def forward(self, x):
        return self.part(x)
"""
AUTO = {"AutoConfig": "configuration_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"}
FILES = {"configuration_own.py": CONFIG, "parts_own.py": PARTS, "modeling_own.py": MODEL, "unrelated.py": "raise"}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base without weights, whose code is in three files, and which has one more beside them."""
    place = tmp_path / "own-base"
    place.mkdir()
    for name, text in FILES.items():
        (place / name).write_text(text)
    config = {"model_type": "own-of-a-test", "architectures": ["OwnModel"], "auto_map": AUTO, "width": 5}
    (place / "config.json").write_text(json.dumps(config))
    return place


def live_model(base: Path) -> Any:
    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(base, trust_remote_code=True)
    return AutoModel.from_config(config, trust_remote_code=True)


WAYS: dict[str, Callable[[Any, Path, Path], Path]] = {
    "live, with a base": lambda model, base, place: export_live(model, base, place / "exports"),
    "live, without one": lambda model, _, place: export_live(model, None, place / "exports"),
    "to-hf": lambda model, base, place: Path(
        to_hf(saved(model.state_dict(), place / "ck"), base, place / "exported").output
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_an_export_of_a_model_with_code_loads_with_it(way: str, base: Path, tmp_path: Path) -> None:
    model = live_model(base)
    model.save_pretrained(tmp_path / "library")
    directory = WAYS[way](model, base, tmp_path)
    code = {path.name for path in directory.glob("*.py")}
    assert code == {path.name for path in (tmp_path / "library").glob("*.py")} == FILES.keys() - {"unrelated.py"}
    loaded, info = AutoModel.from_pretrained(directory, trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"]
    assert loaded.config.width == 5
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("way", ["live, with a base", "to-hf"])
def test_a_base_that_lacks_the_code_that_it_names_is_refused(way: str, base: Path, tmp_path: Path) -> None:
    model = live_model(base)
    (base / "modeling_own.py").unlink()
    with pytest.raises((MismatchError, RuntimeError), match=r"modeling_own\.py: config.json names it in auto_map"):
        WAYS[way](model, base, tmp_path)
    assert not [path for path in tmp_path.rglob("model.safetensors") if ".tmp" not in str(path)]


def test_without_the_code_of_a_model_that_the_library_has_it_is_exported(tmp_path: Path) -> None:
    """``from_pretrained`` takes the library's own class then."""
    model, base = llama(), tmp_path / "base"
    model.save_pretrained(base)
    config = json.loads((base / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.OwnModel"}
    (base / "config.json").write_text(json.dumps(config))
    loaded = AutoModelForCausalLM.from_pretrained(export_live(model, base, tmp_path / "live"))
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())


def test_names_of_code_do_not_lead_out_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "outside.py").write_text("")
    base = tmp_path / "base"
    (base / "deeper").mkdir(parents=True)
    for name in ("a.py", "b.py", "c.py", "deeper/d.py"):
        (base / name).write_text("")
    (base / "a.py").write_text("from .b import x\nfrom . import c\nfrom .deeper.d import y\nfrom ..outside import z\n")
    auto_map = {"AutoConfig": "a.Config", "AutoModel": "../outside.Model", "AutoTokenizer": ["org/name--b.T", None]}
    (base / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map}))
    assert named_code({"auto_map": auto_map}) == ["a.py"]
    assert code_beside(base) == {"a.py", "b.py", "c.py", "deeper/d.py"}
