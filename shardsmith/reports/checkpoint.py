"""The page of ``inspect CHECKPOINT --html``: content, maps of sizes, dtypes and values, all tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from shardsmith.ground.sizes import size_text
from shardsmith.inspection import Inspection
from shardsmith.reports.page import facts_table, make_page, safe, section
from shardsmith.reports.tensor_map import Cell, Colour, by_kind, by_size, legend, tensor_map
from shardsmith.reports.tensor_table import Value, sortable_table
from shardsmith.tensor_listing import ListedTensor

_COLUMNS = ("tensor", "shape", "dtype", "bytes")
_READ = ("root mean square", "minimum", "maximum", "mean", "std", "zeros", "not finite")


def checkpoint_page(found: Inspection, tensors: Sequence[ListedTensor], command: Sequence[str]) -> str:
    """Return the page.

    Args:
        found: What is in the checkpoint.
        tensors: Its tensors, with statistics or without.
        command: The command that makes the page.
    """
    sound = "every byte verified" if found.verified else "no damage found"
    if not found.verified and any(found.compared.values()):
        sound += f"; not compared with anything: {', '.join(found.uncompared)}"
    verdict = "\n".join(found.damage) or sound
    parts = [
        f"<p>{safe(found.format)}: {safe(found.reason)}</p>",
        f'<p class="verdict{" bad" if found.damage else ""}">{safe(verdict)}</p>',
        facts_table(_facts(found)),
    ]
    for number, model in enumerate(dict.fromkeys(tensor.model for tensor in tensors)):
        listed = [tensor for tensor in tensors if tensor.model == model]
        parts += section(f"Model {model}: {len(listed)} tensors", list(_model(number, listed)))
    return make_page(found.path, parts, command)


def _facts(found: Inspection) -> Iterator[tuple[str, str]]:
    known = {
        "step": found.step,
        "ranks that wrote it": found.world_size,
        "written at": found.created_at,
        "average": found.ema and ", ".join(f"{key} {value}" for key, value in found.ema.items()),
        "versions": ", ".join(f"{name} {version}" for name, version in found.libraries.items()),
    }
    yield from ((name, str(value)) for name, value in known.items() if value not in (None, ""))
    for model in found.models:
        dtypes = ", ".join(f"{count:,} {dtype}" for dtype, count in model.dtypes.items())
        yield f"model {model.name}", f"{model.tensors} tensors, {size_text(model.nbytes)}: {dtypes}"
    yield from ((f"beside the models: {name}", size_text(size)) for name, size in found.beside.items())
    yield "files", f"{len(found.files)}, {size_text(sum(found.files.values()))}"


def _model(number: int, tensors: Sequence[ListedTensor]) -> Iterator[str]:
    # By numbers: names may hold what an anchor must not, and appear in several models.
    anchors = {tensor.name: f"m{number}t{i}" for i, tensor in enumerate(tensors)}

    def cells(value: dict[str, float | str | None]) -> list[Cell]:
        return [Cell(one.name, value[one.name], _text(one), anchors[one.name]) for one in tensors]

    if any(one.statistics for one in tensors):
        lengths = {one.name: _root_mean_square(one) for one in tensors}
        yield from _map("root mean square of the values", cells({**lengths}), by_size(_known(lengths.values())))
    sizes = {one.name: float(one.nbytes) for one in tensors}
    yield from _map("size in bytes", cells({**sizes}), by_size(list(sizes.values())))
    dtypes = {one.name: one.dtype for one in tensors}
    colour = by_kind(list(dtypes.values()))
    yield from _map("dtype", cells({**dtypes}), colour)
    yield legend({dtype: colour(dtype) for dtype in dict.fromkeys(dtypes.values())})
    broken = [one.name for one in tensors if one.statistics and one.statistics.not_finite]
    if broken:
        yield f'<p class="bad-text">NaN or infinite values in {safe(", ".join(broken))}</p>'
    columns = _COLUMNS + (_READ if any(one.statistics for one in tensors) else ())
    yield from sortable_table(columns, ((anchors[one.name], _row(one)) for one in tensors), "tensors")


def _map(title: str, cells: Sequence[Cell], colour: Colour) -> Iterator[str]:
    yield f"<p>Coloured by {title}:</p>"
    yield tensor_map(cells, colour)


def _text(tensor: ListedTensor) -> str:
    shape = "x".join(map(str, tensor.shape)) or "scalar"
    tied = f", is {tensor.tied_to}" if tensor.tied_to else ""
    length = _root_mean_square(tensor)
    return f"{shape} {tensor.dtype}, {size_text(tensor.nbytes)}{tied}" + ("" if length is None else f", {length:.3g}")


def _row(tensor: ListedTensor) -> list[Value]:
    shape = "x".join(map(str, tensor.shape)) or "scalar"
    row: list[Value] = [tensor.name, shape, tensor.dtype, tensor.nbytes]
    if (values := tensor.statistics) is not None:
        row += [_root_mean_square(tensor), values.minimum, values.maximum, values.mean, values.std]
        row += [values.zeros, values.not_finite]
    return row


def _root_mean_square(tensor: ListedTensor) -> float | None:
    values = tensor.statistics
    # The mean of the squares is mean**2 + std**2.
    return None if values is None else math.hypot(values.mean, values.std)


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]
