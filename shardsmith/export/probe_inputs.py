"""Inputs that a model of transformers takes, made up within the limits of its config: for whoever asks what it answers.

There are hundreds of classes, but few kinds of inputs. So what the class's forward names as its own main input decides;
where several sets are possible, the first that runs is taken.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from shardsmith.errors import UsageError
from shardsmith.export.probe_images import takes_images, with_image

_LENGTH = 16
_SAMPLES = 4000
"""Of sound, a quarter of a second: more than the widest stack of strides."""
_CHARACTERS = 128
_POSITIONS = ("max_position_embeddings", "n_positions", "max_target_positions", "n_ctx", "max_seq_len", "max_length")
_SPECIAL = ("_token_id", "_token_index")


def made_up_inputs(model: Any) -> dict[str, Tensor]:
    """Keyword arguments of a model's forward, on the CPU. Runs the model once, or a few times.

    Args:
        model: On the meta device the shapes alone are tried; what cannot be known there is taken to run.

    Raises:
        UsageError: none of what is known here runs.
    """
    return _first_that_runs(model, _candidates(model))


def made_up_image(model: Any) -> dict[str, Tensor]:
    """As ``made_up_inputs``: an image and a text, for a model that takes both. Raises UsageError if it is not known."""
    return _first_that_runs(model, _with_image(model))


def _with_image(model: Any) -> Iterator[dict[str, Tensor]]:
    if takes_images(model) and hasattr(model, "get_image_features"):
        yield from with_image(model, made_up_tokens(model.config, _LENGTH))


def _first_that_runs(model: Any, candidates: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    problem = f"it wants {model.main_input_name}"
    device = next(model.parameters()).device
    for inputs in candidates:
        # One kind after the other: which one a class takes cannot be seen from outside.
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                model(**{name: value.to(device) for name, value in inputs.items()})
        except Exception as error:  # whatever a forward raises that wants something else
            # On the meta device an operation that needs values ends so; up to there the inputs fitted.
            if device.type == "meta" and "meta" in str(error):
                return inputs
            problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            continue
        return inputs
    raise UsageError(f"no inputs are known for {type(model).__name__} ({problem})")


def longest_text(config: Any) -> int | None:
    """How many tokens a model has positions for; None where the config sets no limit."""
    text = config.get_text_config(decoder=True)
    found = [getattr(text, name, None) for name in _POSITIONS]
    limits = [value for value in found if isinstance(value, int) and value > 0]
    # Position ids of the RoBERTa kind begin behind the one for padding.
    offset = (getattr(text, "pad_token_id", None) or 0) + 1
    return max(1, limits[0] - offset) if limits and limits[0] <= 1024 else limits[0] if limits else None


def made_up_tokens(config: Any, length: int, rows: int | None = None) -> Tensor:
    """Token ids [1, length] of the vocabulary, none of which stands for an image, for padding, or for an end."""
    text = config.get_text_config(decoder=True)
    # Without a vocabulary a model takes the numbers of characters.
    count = rows or int(getattr(text, "vocab_size", None) or getattr(config, "vocab_size", None) or _CHARACTERS)
    special = {value for part in (config, text) for value in _special_ids(part)}
    usual = [token for token in range(min(count, 4096)) if token not in special] or [0]
    # 7919 is prime, so neighbours are far apart in the vocabulary and no id comes twice soon.
    return torch.tensor([[usual[i * 7919 % len(usual)] for i in range(length)]], device="cpu")


def _special_ids(config: Any) -> Iterator[int]:
    for name, value in vars(config).items():
        if name.endswith(_SPECIAL):
            yield from (token for token in (value if isinstance(value, list) else [value]) if isinstance(token, int))


def _candidates(model: Any) -> Iterator[dict[str, Tensor]]:
    config, wanted = model.config, inspect.signature(model.forward).parameters
    text = dict(_texts(config, wanted)) if "input_ids" in wanted or "decoder_input_ids" in wanted else {}
    decoder = {name: value for name, value in text.items() if name.startswith("decoder_")}
    main = {name: value for name, value in text.items() if name not in decoder}
    # First of all, as a model that takes both is asked with both.
    yield from _with_image(model)
    if model.main_input_name == "input_ids" and text:
        yield text
    for other in _images(config, wanted):
        yield other | decoder
        yield other | main
    for other in _sounds(config, wanted):
        yield other | decoder
        yield other | main
    if text:
        yield text
        yield main


def _texts(config: Any, wanted: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    longest = longest_text(config)
    length = _LENGTH if longest is None else min(_LENGTH, longest)
    tokens = made_up_tokens(config, length)
    if "input_ids" in wanted:
        yield "input_ids", tokens
    if "attention_mask" in wanted and "input_ids" in wanted:
        yield "attention_mask", torch.ones_like(tokens)
    if "decoder_input_ids" in wanted and getattr(config, "is_encoder_decoder", False):
        # Moved by one, as a decoder is given what it has said so far.
        yield "decoder_input_ids", tokens.roll(1, 1)


def _images(config: Any, wanted: Mapping[str, Any]) -> Iterator[dict[str, Tensor]]:
    if "pixel_values" not in wanted:
        return
    parts = [config, *(getattr(config, name, None) for name in ("vision_config", "encoder", "backbone_config"))]
    parts = [part for part in parts if part is not None]
    sizes = [size for part in parts for size in [getattr(part, "image_size", None)] if size]
    channels = next((n for part in parts for n in [getattr(part, "num_channels", None)] if isinstance(n, int)), 3)
    # The size that the config names; else a small one, and the usual one.
    for size in [*sizes[:1], 64, 224]:
        height, width = size if isinstance(size, list | tuple) else (size, size)
        count = channels * height * width
        yield {
            "pixel_values": torch.linspace(-1, 1, count, device="cpu").mul(37).sin().view(1, channels, height, width)
        }


def _sounds(config: Any, wanted: Mapping[str, Any]) -> Iterator[dict[str, Tensor]]:
    names = ("num_mel_bins", "input_feat_per_channel", "feature_size")
    bins = next((value for name in names if (value := getattr(config, name, 0))), 80)
    # Whisper's encoder takes two frames for each position.
    frames = 2 * getattr(config, "max_source_positions", 64)
    shapes: dict[str, list[tuple[int, ...]]] = {
        # Features before or behind the frames, and for models that take any length.
        "input_features": [(1, bins, frames), (1, frames, bins), (1, 64, bins)],
        "input_values": [(1, getattr(config, "max_length", frames), bins), (1, _SAMPLES), (1, 1, _SAMPLES)],
    }
    for name, possible in shapes.items():
        if name in wanted:
            yield from ({name: _wave(shape)} for shape in possible)


def _wave(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(torch.Size(shape).numel(), device="cpu").mul(0.37).sin().view(shape)
