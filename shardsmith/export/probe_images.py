"""An image with some text, for models that take both, as made up as the other inputs.

How many tokens stand for an image, only the model knows: it is asked for the features of one.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_TOKENS = ("image_token_id", "image_token_index")
_MOST = 4096
"""Tokens that an image may take: more would be no small question."""


def takes_images(model: Any) -> bool:
    """Return whether text and images go in together."""
    wanted = inspect.signature(model.forward).parameters
    return {"input_ids", "pixel_values"} <= wanted.keys() and _token(model.config) is not None


def with_image(model: Any, tokens: Tensor) -> Iterator[dict[str, Tensor]]:
    """Arguments of a model's forward with an image before the tokens [1, T]. Raises nothing: what fails is left out.

    Args:
        model: On the meta device shapes alone are tried.
        tokens: None of which stands for an image.
    """
    token = _token(model.config) or 0
    wanted = inspect.signature(model.forward).parameters
    for image, known in _images(model.config, wanted):
        count = known if known is not None else _feature_count(model, image)
        if count is None or not 0 < count <= _MOST:
            continue
        ids = torch.cat([torch.full((1, count), token, device="cpu"), tokens], 1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **image}
        if "mm_token_type_ids" in wanted:
            inputs["mm_token_type_ids"] = ids.eq(token).long()
        if "token_type_ids" in wanted:
            inputs["token_type_ids"] = ids.eq(token).long()
        yield inputs


def _token(config: Any) -> int | None:
    return next((value for name in _TOKENS if isinstance(value := getattr(config, name, None), int)), None)


def _images(config: Any, wanted: Mapping[str, Any]) -> Iterator[tuple[dict[str, Tensor], int | None]]:
    """An image in each way in which models take one, and how many tokens it is where the way says so."""
    vision = getattr(config, "vision_config", None) or config
    # 16 pixels and 3 channels are what most models have; a wrong guess is tried out and left out.
    patch, channels = _first(getattr(vision, "patch_size", 16)), _first(getattr(vision, "num_channels", None) or 3)
    if "image_grid_thw" in wanted:
        merge, frames = getattr(vision, "spatial_merge_size", 1), getattr(vision, "temporal_patch_size", 1)
        # The smallest grid of which 2 by 2 patches are left when the model has merged them.
        side = 2 * merge
        pixels = _wave((side * side, getattr(vision, "in_channels", channels) * frames * patch * patch))
        # 2 by 2 tokens.
        yield {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, side, side]], device="cpu")}, 4
        return
    size = _first(getattr(vision, "image_size", None) or 14 * patch)
    ways = [{"image_sizes": torch.tensor([[size, size]], device="cpu")}] if "image_sizes" in wanted else []
    for sizes in (*ways, {}):
        yield {"pixel_values": _wave((1, channels, size, size)), **sizes}, None
        # With a dimension for several images in a row, as some models want it.
        yield {"pixel_values": _wave((1, 1, channels, size, size)), **sizes}, None


def _feature_count(model: Any, image: Mapping[str, Tensor]) -> int | None:
    """How many features a model makes of an image; None if it takes none in this way."""
    device = next(model.parameters()).device
    known = inspect.signature(model.get_image_features).parameters
    given = {name: _on(device, value) for name, value in image.items() if name in known}
    try:
        # Random numbers that a forward draws must not move those of whoever asks.
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            found = model.get_image_features(**given)
    except Exception:  # whatever it raises that wants something else
        return None
    found = getattr(found, "pooler_output", found)
    features = found if isinstance(found, list | tuple) else [found]
    # The last dimension is the width of a feature.
    counts = [int(one.shape[:-1].numel()) for one in features if isinstance(one, Tensor) and one.dim() > 1]
    return sum(counts) if len(counts) == len(features) else None


def _on(device: torch.device, value: Tensor) -> Tensor:
    """Numbers that say what an image looks like are read by the model, so that on the meta device they stay real."""
    return value if device.type == "meta" and not value.is_floating_point() else value.to(device)


def _first(value: Any) -> int:
    return int(value[0] if isinstance(value, list | tuple) else value)


def _wave(shape: tuple[int, ...]) -> Tensor:
    # No constant and nothing random: it depends on no generator, and each element counts.
    return torch.arange(torch.Size(shape).numel(), device="cpu").mul(0.37).sin().view(shape)
