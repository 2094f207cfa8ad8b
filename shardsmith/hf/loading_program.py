"""The Python program in a model card that loads the weights of an export.

It is for a reader who has the directory and nothing else. So a class is imported from a library only if the library has
it, and remote code is asked for only if it is in the directory or on the Hub. All else is loaded as tensors by name.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from shardsmith.ground.printable import printable
from shardsmith.hf.directory import DirectoryPlan, ModelPlan
from shardsmith.hf.model_class import DIFFUSERS_KEY

# Only a plain name goes into the program: what a config says is text of somebody else.
_CLASS_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)


class LoadingProgram:
    """How an export is loaded.

    Attributes:
        library: The library that loads it, as the Hub calls it; None if none does.
        text: The program; ``DIRECTORY`` stands for the directory.
    """

    def __init__(self, plan: DirectoryPlan, files: Collection[str]) -> None:
        """Write the program for the directory that a plan makes, and that holds these files."""
        config = plan.config or {}
        first, *others = [model for model in plan.models if not model.is_module]
        loads_model = True
        self.library: str | None = None
        # The order is that of what would load it: peft, code of the author, a class of a library, tensors alone.
        if any(model.stem.startswith("adapter_model") for model in plan.models):
            self.library = "peft"
            lines = ["from peft import PeftModel", "", 'model = PeftModel.from_pretrained(base_model, "DIRECTORY")']
        elif auto_class := _remote_class(config, files):
            self.library = "transformers"
            comment = "  # runs the author's Python files"
            lines = [*_from("transformers", auto_class, ", trust_remote_code=True", comment)]
        elif found := _library_class(config):
            self.library = found[0]
            lines = [*_from(*found)]
        else:
            loads_model = False
            lines = [*_unknown_class(config), *_tensors(first, "state_dict")]
        for other in others:  # an average beside the weights, under a name that no loader looks for
            lines += ["", f"# or, instead of the weights of the last step, their average ({other.stem}*.safetensors):"]
            lines += _tensors(other, "average")
            if loads_model:
                lines.append(_with_average(self.library))
        self.text = "\n".join(lines)


def _from(library: str, name: str, options: str = "", comment: str = "") -> Iterator[str]:
    yield from (f"from {library} import {name}", "")
    yield f'model = {name}.from_pretrained("DIRECTORY"{options}){comment}'


def _with_average(library: str | None) -> str:
    if library == "transformers":  # its loader knows which names of files are which of the model
        return "model = type(model).from_pretrained(None, config=model.config, state_dict=average)"
    return "model.load_state_dict(average)"


def _tensors(model: ModelPlan, name: str) -> Iterator[str]:
    """Load all files of a model's weights into one dict."""
    files = [printable(file.name) for file in model.weights.files] or [f"{model.stem}.safetensors"]
    if len(files) == 1:
        yield from ("from safetensors.torch import load_file", "", f'{name} = load_file("DIRECTORY/{files[0]}")')
        return
    yield from ("from pathlib import Path", "", "from safetensors.torch import load_file", "", f"{name} = {{}}")
    yield f'for file in Path("DIRECTORY").glob("{model.stem}-*.safetensors"):'
    yield f"    {name} |= load_file(file)"


def _unknown_class(config: Mapping[str, Any]) -> Iterator[str]:
    """Say of a class that no library has why the program does not make it."""
    for library, name in _named(config):
        yield f"# {name}, which config.json names, is not a class of {library}. Make the model with the code that"
        yield "# defines the class, and load these tensors into it."


def _library_class(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """The library, and its class, that loads what this config.json describes."""
    named = [*_named(config)]
    for library, name in named:
        if _has(library, name):
            return library, name
    # Without a named class ``AutoModel`` takes the one of the model type.
    if not named and _knows_model_type(config.get("model_type")):
        return "transformers", "AutoModel"
    return None


def _named(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The one class that a config names, with the library that it should be from."""
    architectures = config.get("architectures")
    only = architectures[0] if isinstance(architectures, list) and len(architectures) == 1 else None
    for library, name in (("transformers", only), ("diffusers", config.get(DIFFUSERS_KEY))):
        if isinstance(name, str) and _CLASS_NAME.fullmatch(name):
            yield library, name


def _has(library: str, name: str) -> bool:
    """Whether a library has a class that loads directories. One that is not installed is taken at the config's word."""
    # Not installed here says nothing about the reader of the card.
    if importlib.util.find_spec(library) is None:
        return True
    try:
        return hasattr(getattr(importlib.import_module(library), name, None), "from_pretrained")
    except ImportError:  # it has the class, which needs another package
        return True
    except Exception:
        return False


def _knows_model_type(model_type: object) -> bool:
    if not isinstance(model_type, str):
        return False
    if importlib.util.find_spec("transformers") is None:
        return True
    from transformers.models.auto import configuration_auto

    return model_type in vars(configuration_auto)["CONFIG_MAPPING_NAMES"]


def _remote_class(config: Mapping[str, Any], files: Collection[str]) -> str | None:
    """The auto class whose code is in the directory or on the Hub, that of ``architectures`` before others."""
    auto_map = config.get("auto_map")
    architectures = config.get("architectures")
    wanted = architectures[0] if isinstance(architectures, list) and architectures else None
    found: dict[str, str] = {}
    for auto_class, target in auto_map.items() if isinstance(auto_map, dict) else ():
        if not isinstance(target, str) or not re.fullmatch(r"AutoModel\w*", auto_class, re.ASCII):
            continue
        # As in "org/name--modeling.Class": code of a repository of the Hub; without it, of this directory.
        repository, _, reference = target.rpartition("--")
        module, _, name = reference.rpartition(".")
        if repository or f"{module}.py" in files:
            found[name if name not in found else auto_class] = auto_class
    return found.get(str(wanted)) or next(iter(found.values()), None)
