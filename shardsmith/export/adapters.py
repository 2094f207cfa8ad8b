"""Checkpoints of a model with a peft adapter: the adapter alone, as peft saves it, or merged into the weights.

The model is made without data from the base model's config, peft puts the adapter's layers into it, and both say what
the tensors are called. What merging does to a layer is done by peft itself, one layer at a time.
"""

from __future__ import annotations

import copy
import re
import shutil
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import Tensor

from shardsmith.errors import CheckpointNotFoundError, MismatchError, UsageError
from shardsmith.formats.by_path import model_names, open_source
from shardsmith.formats.models import ModelSource
from shardsmith.tensors.checkpoint_keys import MAIN
from shardsmith.tensors.tensors import Chunk, TensorSource, TensorSpec, read_tensor

ADAPTER_WEIGHTS = "adapter_model"
"""Stem of the weight files of an adapter, as peft names it."""
ADAPTER_CONFIG_FILE = "adapter_config.json"

# Modules and parameters that peft puts between the names of the model's own.
_PEFT_NAMES = re.compile(
    r"(^|\.)(base_model\.model\.|base_layer\.|modules_to_save\.|lora_[AB](\.|$)|lora_embedding_[AB])"
)
_PEFT_ALONE = re.compile(r"(^|\.)(base_model\.model|base_layer|modules_to_save)\.")
_LORA_MATRIX = re.compile(r"^(?P<module>.+)\.lora_[AB](\.weight)?$")
_ADAPTER_NAME = re.compile(
    r"\.(?:lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|modules_to_save)\.(?P<name>[^.]+)(\.|$)"
)
_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
_IN_FRONT = re.compile(r"^.*?(?=(?<![^.])base_model\.model\.)")
_ON_ITS_OWN = ("pissa", "olora", "corda", "eva", "loftq")
"""Initialisations that change the base weights: without these an adapter means nothing."""


class AdapterCheckpoint:
    """A checkpoint of a peft model, and the model that its adapter is for."""

    def __init__(self, checkpoint: Path, base: Path, source: ModelSource) -> None:
        """Make the model from the base's config and put the adapter's layers into it, without data.

        Raises:
            UsageError: there is no adapter_config.json, peft is not installed, or it cannot make such a model.
            UnsupportedFormatError: transformers has no class for the base model.
        """
        self.source = source
        self.directory = _directory_of(checkpoint, source)
        # Part of the names of its tensors, as in "lora_A.default.weight", so the model is made with it.
        self.name = _adapter_name(source)
        self.model = _peft_model(self.directory, base, self.name)
        places = self.model.state_dict()
        self.keys = {_placed(fqn, places): name for fqn, name in _keys_by_fqn(source, self.name).items()}
        # Names of the adapter that have no place: it belongs to another config. Other names may be buffers or heads.
        lost = [name for fqn, name in self.keys.items() if fqn not in places and _PEFT_NAMES.search(fqn)]
        # Of another rank: it belongs to another config as well.
        lost += [name for fqn, name in self.keys.items() if ".lora_" in fqn and not self._has_shape(places, fqn)]
        if lost:
            problem = f"{len(lost)} tensors are not where adapter_config.json and the base model have them"
            advice = (
                "Nothing was written. Check that it is the adapter_config.json of this run, and the base model of it."
            )
            raise MismatchError(source.path, problem, lost[:8], advice)

    def _has_shape(self, places: Mapping[str, Tensor], fqn: str) -> bool:
        return fqn not in places or tuple(places[fqn].shape) == self.source.specs[self.keys[fqn]].shape

    def adapter(self) -> ModelSource:
        """Take the adapter alone, under the names that peft gives it in its files."""
        return ModelSource(self.source, self._adapter_keys(), filled=frozenset(), aliases={})

    def write_config(self, directory: Path) -> None:
        """Write ``adapter_config.json``, as it lies beside the checkpoint."""
        shutil.copyfile(self.directory / ADAPTER_CONFIG_FILE, directory / ADAPTER_CONFIG_FILE)

    def merged(self, base: TensorSource | None) -> ModelSource:
        """Take the whole model with the adapter merged; weights that the checkpoint lacks come from the base.

        Raises:
            UsageError: an adapter of this kind cannot be merged.
            MismatchError: some weights are in neither.
        """
        source = MergedSource(self, base)
        names = {name: name for name in source.specs if name not in source.aliases}
        return ModelSource(source, names, filled=frozenset(), aliases=source.aliases)

    def _adapter_keys(self) -> dict[str, str]:
        from peft import get_peft_model_state_dict

        places = self.model.state_dict()
        fqns = {name: self.keys[name] for name in places if name in self.keys}
        # peft chooses by its own rules, also which copies of modules belong to the adapter; values are names here.
        # As there, embeddings go along if the vocabulary has another size than the base's.
        specs = self.source.specs
        is_resized = any(tuple(places[fqn].shape) != specs[name].shape for fqn, name in fqns.items())
        chosen = get_peft_model_state_dict(self.model, fqns, adapter_name=self.name, save_embedding_layers=is_resized)
        if not chosen:
            problem = "no tensor belongs to the adapter that adapter_config.json describes"
            advice = "Check that it is the adapter_config.json of this run."
            raise MismatchError(self.source.path, problem, list(self.source.specs)[:8], advice)
        return dict(chosen)


class MergedSource:
    """The model's weights with the adapter merged into them (a ``TensorSource``). One layer in memory."""

    def __init__(self, adapter: AdapterCheckpoint, base: TensorSource | None) -> None:
        """Raises as ``AdapterCheckpoint.merged``."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.path = adapter.source.path
        self._adapter = adapter
        self._base = base
        self._keys = adapter.keys
        inner = adapter.model.get_base_model()
        modules = dict(adapter.model.named_modules())
        # Where peft holds the model; the names in the model's files do not have this prefix.
        self._prefix = next(path for path, part in modules.items() if part is inner) + "."
        self._layers: dict[str, Any] = {
            path: part for path, part in modules.items() if isinstance(part, BaseTunerLayer)
        }
        # Modules that peft has replaced by trained copies: the copy is the model's, and the original is left out.
        self._copies = replaced_modules(modules)
        if adapter.model.active_peft_config.is_prompt_learning or not all(
            hasattr(p, "merge") for p in self._layers.values()
        ):
            # What has no ``merge`` changes the computation and no weights, as a prompt does.
            raise UsageError("an adapter of this kind cannot be merged: export it as it is, with --adapters adapter")
        # One merged layer: the blocks of its tensors come one after the other.
        self._last: tuple[str, dict[str, Tensor]] = ("", {})
        self._merging = threading.Lock()
        self._places = self._find_places()
        self.specs: Mapping[str, TensorSpec] = {name: TensorSpec(name, *self._shape_of(name)) for name in self._places}

    @property
    def aliases(self) -> dict[str, str]:
        """Names that the class ties and no layer of the adapter changes -> the one that the base model's files have."""
        groups = {frozenset((name, *others)) for name, others in self._ties().items()}
        untouched = [[name for name in self._places if name in group] for group in groups]
        # A tie that the adapter has changed under one name is none any more: both are written.
        untouched = [names for names in untouched if not any(self._places[name][0] for name in names)]
        listed = self._base.specs if self._base is not None else {}
        kept = {name: next((n for n in names if n in listed), names[0]) for names in untouched for name in names}
        return {name: to for name, to in kept.items() if name != to}

    def pieces(self, name: str, box: Chunk) -> Iterator[tuple[Chunk, Tensor]]:
        """As ``TensorSource.pieces``."""
        if name not in self._places:
            raise CheckpointNotFoundError(self.path, f"has no tensor named {name!r}")
        path, fqn = self._places[name]
        if path is not None:
            # By its name below the layer, as the state dict of the merged base layer has it.
            values = self._merged(path)[fqn.removeprefix(f"{path}.")]
            yield box, values[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))]
            return
        source, key = self._holder(fqn)
        yield from source.pieces(key, box)

    def close(self) -> None:
        """Close the files."""
        self._last = ("", {})
        self._adapter.source.close()
        if self._base is not None:
            self._base.close()

    def _find_places(self) -> dict[str, tuple[str | None, str]]:
        """Name -> the adapter's layer that changes it, if one does, and its FQN in the peft model."""
        places: dict[str, tuple[str | None, str]] = {}
        for fqn in self._adapter.model.state_dict():
            if (plain := self._plain_name(fqn)) is not None:
                layer = next((path for path in self._layers if fqn.startswith(f"{path}.base_layer.")), None)
                places[plain.removeprefix(self._prefix)] = (layer, fqn)
        lacking = [name for name, (_, fqn) in places.items() if not self._has(fqn)]
        alike = self._ties()
        # A tied tensor that is there under its other name is not missing.
        lacking = [
            name for name in lacking if not any(twin in places and twin not in lacking for twin in alike.get(name, ()))
        ]
        if lacking:
            lines = [f"{name}: neither in the checkpoint nor in the base model's weights" for name in lacking]
            advice = "Name a base model with its weights, or export the adapter alone: --adapters adapter."
            raise MismatchError(self.path, f"{len(lines)} tensors of the model are not there", lines, advice)
        return {name: place for name, place in places.items() if self._has(place[1])}

    def _ties(self) -> dict[str, tuple[str, ...]]:
        """Name of each tensor that is tied -> the others of it."""
        names: dict[int, list[str]] = {}
        for fqn, parameter in self._adapter.model.named_parameters(remove_duplicate=False):
            if (plain := self._plain_name(fqn)) is not None:
                names.setdefault(id(parameter), []).append(plain.removeprefix(self._prefix))
        return {name: tuple(other for other in group if other != name) for group in names.values() for name in group}

    def _plain_name(self, fqn: str) -> str | None:
        return without_adapter(fqn, self._layers, self._copies, self._adapter.name)

    def _has(self, fqn: str) -> bool:
        return fqn in self._keys or (self._base is not None and self._base_name(fqn) in self._base.specs)

    def _base_name(self, fqn: str) -> str:
        return (self._plain_name(fqn) or fqn).removeprefix(self._prefix)

    def _holder(self, fqn: str) -> tuple[TensorSource, str]:
        if fqn in self._keys:
            return self._adapter.source, self._keys[fqn]
        assert self._base is not None
        return self._base, self._base_name(fqn)

    def _shape_of(self, name: str) -> tuple[Any, Any]:
        source, key = self._holder(self._places[name][1])
        return source.specs[key].shape, source.specs[key].dtype

    def _merged(self, path: str) -> dict[str, Tensor]:
        """Merge one layer of the adapter; by FQN below it."""
        # Several threads read: without the lock one would get the layer that another has just merged.
        with self._merging:
            if self._last[0] != path:
                # A copy: the layer of the model has no data, and must stay so for the next one.
                layer = copy.deepcopy(self._layers[path])
                held = [name for name in layer.state_dict() if self._has(f"{path}.{name}")]
                # Cloned: merging adds to the weight in place, and a read tensor is a view on a read-only file.
                state = {name: read_tensor(*self._holder(f"{path}.{name}")).clone() for name in held}
                # ``assign``: the parameters are on the meta device, into which nothing can be copied.
                layer.load_state_dict(state, assign=True, strict=False)
                for parameter in layer.parameters():
                    parameter.requires_grad_(False)
                layer.merge(adapter_names=[self._adapter.name])
                base = layer.get_base_layer()
                self._last = path, {f"base_layer.{name}": value.detach() for name, value in base.state_dict().items()}
            return self._last[1]


def open_merged(source: ModelSource, checkpoint: Path, base: Path) -> ModelSource:
    """Return the model with its adapter merged; the source itself where it holds no adapter.

    Raises as ``AdapterCheckpoint.merged``.
    """
    if not is_peft(source):
        return source
    weights = open_source(base) if MAIN in model_names(base) else None
    return AdapterCheckpoint(checkpoint, base, source).merged(weights)


def without_adapter(fqn: str, tuned: Iterable[str], replaced: Iterable[str], adapter: str) -> str | None:
    """Return the name without what peft puts into it; None for the adapter's own tensors.

    Args:
        fqn: Clean FQN of a tensor.
        tuned: Paths of the layers that the adapter changes.
        replaced: Paths of the modules of which it trains a copy.
        adapter: Its name.
    """
    # Before the tuned layers: of a module with a copy, only that copy is the model's.
    for path in replaced:
        if fqn.startswith(f"{path}."):
            inside, active = fqn.removeprefix(f"{path}."), f"modules_to_save.{adapter}."
            return f"{path}.{inside.removeprefix(active)}" if inside.startswith(active) else None
    for path in tuned:
        if fqn.startswith(f"{path}."):
            inside = fqn.removeprefix(f"{path}.")
            # An embedding of which single rows are trained lies one module deeper.
            module = path.removesuffix(".token_adapter")
            return f"{module}.{inside.removeprefix('base_layer.')}" if inside.startswith("base_layer.") else None
    return fqn


def replaced_modules(modules: Mapping[str, Any]) -> list[str]:
    """Return the paths of the modules of which an adapter trains a copy, of modules by path."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    wrappers = {path: part for path, part in modules.items() if isinstance(part, AuxiliaryTrainingWrapper)}
    # One of single rows holds a layer that is merged, and no copy.
    return [path for path, part in wrappers.items() if not hasattr(part, "token_adapter")]


def is_peft(source: ModelSource) -> bool:
    """Return whether the names of a model are those of a peft model."""
    # loralib and layers made by hand keep the weight beside the matrices, where peft moves it into base_layer.
    by_hand = (match["module"] for name in source.specs if (match := _LORA_MATRIX.search(name)))
    if not any(_PEFT_ALONE.search(name) for name in source.specs) and any(
        f"{module}.weight" in source.specs for module in by_hand
    ):
        return False
    return any(_PEFT_NAMES.search(name) for name in source.specs)


def _directory_of(checkpoint: Path, source: ModelSource) -> Path:
    places = [checkpoint, checkpoint.parent] if checkpoint.is_dir() else [checkpoint.parent]
    for place in places:
        if (place / ADAPTER_CONFIG_FILE).is_file():
            return place
    example = next(name for name in source.specs if _PEFT_NAMES.search(name))
    adapter = next(iter(_adapter_names(source)), "default")
    raise UsageError(
        f"{checkpoint} holds a model with an adapter of peft ({example}), and there is no {ADAPTER_CONFIG_FILE} in "
        f"{' or '.join(map(str, places))}. Copy that of the run there: "
        f"model.peft_config[{adapter!r}].save_pretrained(DIRECTORY) writes it"
    )


def _adapter_names(source: ModelSource) -> list[str]:
    # The pattern also fits files of peft, which leave the adapter's name out: what follows is the parameter then.
    found = {match["name"] for name in source.specs if (match := _ADAPTER_NAME.search(name))}
    return sorted(found - {"weight", "bias"})


def _adapter_name(source: ModelSource) -> str:
    names = _adapter_names(source)
    if len(names) > 1:
        first, *others = names
        patterns = [pattern for other in others for pattern in (f"*.{other}", f"*.{other}.*")]
        raise UsageError(
            f"{source.path} holds several adapters, {', '.join(names)}; one can be exported, which is that of "
            f"{ADAPTER_CONFIG_FILE}. Leave the others out; for {first}: --drop "
            + " ".join(
                f"'{pattern}'" for pattern in patterns if any(fnmatchcase(name, pattern) for name in source.specs)
            )
        )
    return names[0] if names else "default"


def _keys_by_fqn(source: ModelSource, adapter: str) -> dict[str, str]:
    """FQN in the peft model -> name in the checkpoint.

    That lacks the adapter's name where peft has saved it, and has what wrappers put into it, or the attribute that has
    the peft model.
    """
    keys: dict[str, str] = {}
    for name in source.specs:
        inner = _IN_FRONT.sub("", _WRAPPERS.sub("", name), count=1)
        # peft puts the adapter's name there when it loads, and takes it out when it saves.
        keys[re.sub(r"\.(lora_(?:embedding_)?[AB])(\.weight)?$", rf".\1.{adapter}\2", inner)] = name
    return keys


def _placed(fqn: str, places: Collection[str]) -> str:
    """The FQN in this model of a weight that another adapter, which was left out, has wrapped."""
    bare = fqn.replace(".original_module.", ".").replace(".base_layer.", ".")
    return bare if fqn not in places and bare in places else fqn


def _peft_model(directory: Path, base: Path, name: str) -> Any:
    from shardsmith.hf.blueprint import model_of_directory, without_weights

    try:
        from peft import PeftConfig, get_peft_model
    except ImportError as error:
        raise UsageError(f"{directory} holds an adapter, which needs peft: pip install peft") from error
    config = PeftConfig.from_pretrained(str(directory))
    start = getattr(config, "init_lora_weights", None)
    # The base weights at hand are those before the run changed them: an adapter on top of them would be another model.
    if isinstance(start, str) and start.lower().startswith(_ON_ITS_OWN):
        raise UsageError(
            f"{directory / ADAPTER_CONFIG_FILE}: init_lora_weights={start!r} changed the base model's weights "
            "at the start of the run. Export it from the run itself (HFExport), or convert it with peft"
        )
    # Its first values are overwritten by the checkpoint's, and some initialisations compute them from real weights.
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = False
    try:
        with without_weights():
            return get_peft_model(model_of_directory(base), config, adapter_name=name)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UsageError(f"peft cannot put the adapter of {directory} into {base}: {error}") from error
