"""A model that runs: what it answers to a batch, with its own weights or with a checkpoint's."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from shardsmith.diagnose.batches import Batch
from shardsmith.errors import UnsupportedFormatError
from shardsmith.export.load_check import first_tensor
from shardsmith.ground.extras import describe_failure
from shardsmith.ground.local_copy import on_this_machine
from shardsmith.tensors.fqn import non_persistent_buffers
from shardsmith.tensors.tensors import TensorSource, read_tensor


@dataclass(frozen=True, slots=True)
class LiveModel:
    """A transformers model on the CPU, in float32, for evaluation."""

    module: Any

    @classmethod
    def of_directory(cls, directory: Path, *, trust_remote_code: bool = False) -> LiveModel:
        """As ``from_pretrained`` makes it.

        Raises:
            UnsupportedFormatError: it does not.
        """
        try:
            # A class reads a local directory only; one in a store is fetched, with its weights, and goes afterwards.
            with _quiet(), on_this_machine(directory, weights=True) as place:
                kind, options = _class_of(place, trust_remote_code=trust_remote_code)
                module = kind.from_pretrained(str(place), dtype=torch.float32, local_files_only=True, **options)
        except Exception as error:  # whatever the model's own code raises
            raise _unusable(directory, error) from error
        return cls(module.eval())

    def with_weights(
        self,
        source: TensorSource,
        names: list[str],
        config: Any = None,
        rounded: Mapping[str, torch.dtype] = MappingProxyType({}),
    ) -> LiveModel:
        """Return a second model with these tensors of a source, named as in files.

        Args:
            source: The tensors to read.
            names: Names of the tensors to load.
            config: Config of the model: that of this one, unless given. If it is of another kind of model, the class
                is the one that it names.
            rounded: Name -> the dtype that its values are rounded to on the way to float32.

        Raises:
            UnsupportedFormatError: some of the model's tensors are not among them, or it cannot be made.
            CheckpointError: from reading.
        """
        state = {name: _wide(read_tensor(source, name), rounded.get(name)) for name in names}
        try:
            with _quiet():
                # The class of the first one: an architecture is a name, and says nothing of what is computed.
                is_alike = config is None or isinstance(config, type(self.module.config))
                kind = type(self.module) if is_alike else _class_for(config)
                module, info = kind.from_pretrained(
                    None, config=config or self.module.config, state_dict=state, output_loading_info=True
                )
        except Exception as error:
            raise _unusable(source.path, error) from error
        if missing := sorted(info["missing_keys"]):
            raise UnsupportedFormatError(source.path, f"lacks {', '.join(missing)}, so the model cannot run")
        # ``float``: a load may leave some parameters in the dtype that the config says.
        return LiveModel(module.float().eval())

    @property
    def predicts_tokens(self) -> bool:
        """Whether it is a language model of the kind that a loss for the next token is taken of."""
        config = self.module.config
        if getattr(config, "is_encoder_decoder", False) or self.module.main_input_name != "input_ids":
            return False
        if not self._tables:  # several at once, as of a codec's tokens
            return False
        # The bases count: a model's own class may derive from one that the library lists.
        names = [kind.__name__ for kind in type(self.module).__mro__]
        known = any(name.endswith(("ForCausalLM", "LMHeadModel")) or name in _language_models() for name in names)
        return known or "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})

    @property
    def vocabulary(self) -> int:
        """How many tokens it both takes and predicts: an embedding may have more rows, such as prompts of its own."""
        # The smaller one: an id must have a row in the embedding, and a place among the logits.
        return min(int(table.shape[0]) for table in self._tables)

    @property
    def _tables(self) -> list[Tensor]:
        """The weights of its embedding, if it has a single one, and of its head."""
        try:
            first, last = self.module.get_input_embeddings(), self.module.get_output_embeddings()
        except NotImplementedError:  # of a model of several parts, no one of which is the one
            return []
        tables = [getattr(module, "weight", None) for module in (first, last)]
        return [] if tables[0] is None else [table for table in tables if table is not None]

    @property
    def is_library_class(self) -> bool:
        """Whether its code is that of transformers, and not of whoever made the model."""
        import transformers

        kind = type(self.module)
        # The same object under its name in the library: a copy of the code would be another class.
        return getattr(transformers, kind.__name__, None) is kind

    @torch.no_grad()
    def answer(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The logits of any kind of model, or else the first tensor of its output, in float32; always the same ones."""
        with torch.random.fork_rng(devices=[]):
            # Some models draw what to mask. ``torch.manual_seed`` would seed accelerators, too, for good.
            torch.default_generator.manual_seed(0)
            try:
                output = self.module(**inputs)
            except Exception as error:
                raise _unusable(Path(type(self.module).__name__), error) from error
        return first_tensor(output).float()

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """[B, T, V] in float32. Each packed document, where the batch has positions, sees itself alone.

        Padding, where the batch has a mask, is seen by nothing.
        """
        if batch.positions is None:
            logits: Tensor = self._run(input_ids=batch.tokens, **self._mask(batch)).logits
            return logits.float()
        rows = [
            torch.cat([self.plain_logits(tokens[None])[0] for tokens in row.split(lengths)])
            for row, lengths in zip(batch.tokens, batch.document_lengths(), strict=True)
        ]
        return torch.stack(rows)

    @torch.no_grad()
    def plain_logits(self, tokens: Tensor) -> Tensor:
        """[B, T, V] in float32 of whole rows, whatever they were packed from."""
        logits: Tensor = self._run(input_ids=tokens).logits
        return logits.float()

    @torch.no_grad()
    def reported_loss(self, batch: Batch) -> float:
        """Return what the model's own forward calls the loss, given unshifted labels."""
        return float(self._run(input_ids=batch.tokens, labels=batch.labels, **self._mask(batch)).loss)

    @torch.no_grad()
    def auxiliary_loss(self, batch: Batch) -> float | None:
        """Return the weighted load-balancing term of a mixture of experts; None for other models."""
        factor = getattr(self.module.config, "router_aux_loss_coef", None)
        if not factor:
            return None
        found = self._run(input_ids=batch.tokens, output_router_logits=True, **self._mask(batch)).aux_loss
        return None if found is None else float(factor) * float(found)

    def buffers(self) -> dict[str, Tensor]:
        """Return the non-persistent ones."""
        names = set(non_persistent_buffers(self.module))
        return {name: buffer for name, buffer in self.module.named_buffers() if name in names}

    @contextlib.contextmanager
    def with_buffers(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """For a while, other values in the non-persistent buffers."""
        before = {name: buffer.clone() for name, buffer in self.buffers().items()}
        try:
            self._fill(values)
            yield
        finally:
            self._fill(before)

    def _mask(self, batch: Batch) -> dict[str, Tensor]:
        """What to tell the model of padding, if the batch and its class know of it."""
        takes_it = "attention_mask" in inspect.signature(self.module.forward).parameters
        if batch.mask is None or batch.positions is not None or not takes_it:
            return {}
        return {"attention_mask": batch.mask}

    def _run(self, **arguments: Any) -> Any:
        """The model's own forward. Raises UnsupportedFormatError if that raises anything."""
        try:
            return self.module(use_cache=False, **arguments)
        except Exception as error:
            raise _unusable(Path(type(self.module).__name__), error) from error

    @torch.no_grad()
    def _fill(self, values: Mapping[str, Tensor]) -> None:
        for name, buffer in self.buffers().items():
            if name in values and values[name].shape == buffer.shape:
                buffer.copy_(values[name])


def _class_of(directory: Path, *, trust_remote_code: bool) -> tuple[Any, dict[str, Any]]:
    """The class that a config names, and what to call its from_pretrained with besides."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(
        str(directory), local_files_only=True, trust_remote_code=trust_remote_code
    )
    own = [name for name in getattr(config, "auto_map", None) or {} if name.startswith("AutoModel")]
    if trust_remote_code and own:
        return getattr(transformers, own[0]), {"trust_remote_code": True}
    return _class_for(config), {}


def _class_for(config: Any) -> Any:
    import transformers

    # A list, of which the first is the model that was saved.
    named = (config.architectures or [""])[0]
    return getattr(transformers, named, transformers.AutoModelForCausalLM)


def _language_models() -> set[str]:
    """Classes that transformers lists as language models, also such that take images besides."""
    from transformers.models.auto import modeling_auto as auto

    found: set[str] = set()
    for names in (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
        for name in names.values():
            found.update((name,) if isinstance(name, str) else name)
    return found


def _wide(values: Tensor, rounded: torch.dtype | None) -> Tensor:
    """In float32, and in memory of its own: where a view on a file begins may decide the last bit of a product."""
    wide = torch.float32 if values.is_floating_point() else values.dtype
    return values.to(rounded or values.dtype).to(wide, copy=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers tells of its progress on stderr, where a report has no use for it."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _unusable(path: Path, error: Exception) -> UnsupportedFormatError:
    reason = describe_failure(error).splitlines()[0]
    return UnsupportedFormatError(path, f"no model can be made of it to run ({reason})")
