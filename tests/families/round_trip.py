"""What a family goes through, and what is right: compared with the library's own files and its own loader."""

from __future__ import annotations

import contextlib
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file
from torch import Tensor

from shardsmith.compare.verification import VerifyOptions, verify
from shardsmith.diagnose import Questions, diagnose
from shardsmith.export.load_check import first_tensor
from shardsmith.export.plan import ExportOptions, choose_stems, plan_directory
from shardsmith.export.probe_inputs import made_up_inputs
from shardsmith.export.write import write_directories
from shardsmith.hooks import HFExport, Hooks, every
from tests.ranks import run_on_ranks

from . import sharded
from .results import COLUMNS, NOT_ASKED, RIGHT, Result
from .tiny import Family, NotTinyError, make_tiny


def round_trip(family: Family, folder: Path, columns: Sequence[str] = COLUMNS) -> Result:
    """Save, convert with the base and with its config alone, export live, on two ranks, too; verify and diagnose."""
    result = Result(family)
    with _quiet():
        try:
            model = make_tiny(family)
            expected = _saved_by_the_library(model, folder / "base")
        except NotTinyError as reason:
            result.left_out = str(reason)
            return result
        except Exception as error:
            result.left_out = f"save_pretrained or from_pretrained of transformers fails: {said(error)}"
            return result
        bodies: dict[str, Callable[[], str | None]] = {
            "base, flat": lambda: _flat(folder, model, expected),
            "base, nested": lambda: _nested(folder, model),
            "config alone": lambda: _config_alone(folder, model, expected),
            "bfloat16": lambda: _bfloat16(folder, model),
            "live": lambda: _live(folder, model),
            "2 ranks": lambda: _sharded(folder, family),
            "logits": lambda: _logits(folder, model),
            "verify": lambda: _verified(folder),
            "diagnose": lambda: _diagnosed(folder),
        }
        for column in columns:
            _try(result, column, bodies[column], folder)
    return result


def _saved_by_the_library(model: Any, base: Path) -> dict[str, Tensor]:
    """What the library's loader gives back of what the library has saved: the measure of everything else."""
    model.save_pretrained(base)
    loaded, info = type(model).from_pretrained(base, output_loading_info=True)
    if bad := [key for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]]:
        raise NotTinyError(f"from_pretrained does not take back what save_pretrained has written ({bad[0]})")
    state = {name: value for name, value in loaded.state_dict().items() if isinstance(value, Tensor)}
    own = model.state_dict()
    if other := [name for name, value in state.items() if not _equal(own[name], value)]:
        raise NotTinyError(f"from_pretrained gives back other values than were saved, {other[0]} for one")
    return {name: value.clone() for name, value in state.items()}


def _flat(folder: Path, model: Any, expected: Mapping[str, Tensor]) -> None:
    _dcp_save(dict(model.state_dict()), folder / "flat")
    convert(folder / "flat", folder / "base", folder / "out-flat")
    assert_as_the_library_saves(folder / "out-flat", folder / "base")
    _assert_loads(folder / "out-flat", model, expected)


def _nested(folder: Path, model: Any) -> None:
    _dcp_save({"model": model.state_dict(), "step": 7}, folder / "nested")
    convert(folder / "nested", folder / "base", folder / "out-nested")
    assert_as_the_library_saves(folder / "out-nested", folder / "base")


def _config_alone(folder: Path, model: Any, expected: Mapping[str, Tensor]) -> None:
    (folder / "bare").mkdir()
    shutil.copy(folder / "base" / "config.json", folder / "bare")
    said = convert(folder / "flat", folder / "bare", folder / "out-bare")
    assert "not compared" not in said, said
    _assert_loads(folder / "out-bare", model, expected)


def _bfloat16(folder: Path, model: Any) -> None:
    """The library keeps some tensors of some classes in float32 when it is asked for another dtype."""
    type(model).from_pretrained(folder / "base", dtype=torch.bfloat16).save_pretrained(folder / "base-bfloat16")
    convert(folder / "flat", folder / "base", folder / "out-bfloat16", torch.bfloat16)
    # It makes a count float32 where it keeps the module that counts; ours stays a count.
    counts = {n: v for n, v in load_file(folder / "base" / "model.safetensors").items() if not v.is_floating_point()}
    theirs = load_file(folder / "base-bfloat16" / "model.safetensors")
    _assert_equal(load_file(folder / "out-bfloat16" / "model.safetensors"), theirs | counts)


def _live(folder: Path, model: Any) -> None:
    hooks = Hooks(HFExport(folder / "live", model=model, base_model=folder / "base", when=every(1), dtype="original"))
    hooks.step(1)
    hooks.close()
    assert_as_the_library_saves(folder / "live" / "step-1", folder / "base")


def _sharded(folder: Path, family: Family) -> str | None:
    """Our save and the live export of two FSDP2 ranks."""
    try:
        run_on_ranks(sharded.run_sharded, 2, folder, folder, [family])
    except Exception as error:
        if "_fully_shard/" in str(error):
            return f"{NOT_ASKED}torch's fully_shard does not take such a model"
        raise
    sharded.assert_right(folder)
    return None


def _logits(folder: Path, model: Any) -> str | None:
    """What the class answers with our files is what it answers with its own, to the last bit."""
    kind = type(model)
    try:
        theirs = _loaded(kind, folder / "base")
        inputs = made_up_inputs(theirs)
        expected = _answer(theirs, inputs)
    except Exception as error:
        return f"{NOT_ASKED}{said(error)}"
    assert torch.equal(_answer(theirs, inputs), expected) or expected.isnan().any(), "the class answers at random"
    for other in ("out-flat", "out-bare"):
        found = _answer(_loaded(kind, folder / other), inputs)
        assert torch.equal(found.nan_to_num(), expected.nan_to_num()), f"{other}: other logits"
    return None


def _loaded(kind: Any, directory: Path) -> Any:
    """In memory of its own: where a view on a file begins may decide the last bit of a product."""
    model = kind.from_pretrained(directory).eval()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


@torch.no_grad()
def _answer(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    torch.manual_seed(0)  # some models draw what to mask
    return first_tensor(model(**inputs)).float()


def _verified(folder: Path) -> None:
    # Two directories also have to say the same settings: what was exported says those of its base.
    for one, other in (("flat", "out-flat"), ("flat", "out-bare"), ("flat", "base"), ("base", "out-bare")):
        found = verify(folder / one, folder / other, VerifyOptions())
        assert found.same, f"{one} and {other}: not the same model {dict(found.settings)}"


def _diagnosed(folder: Path) -> str | None:
    """No finding at any level. A model that cannot be run is said to be unseen at the level ``model`` alone."""
    found = diagnose(folder / "nested", folder / "base", Questions(level="all"))
    wrong = dict.fromkeys(finding.code for finding in found.faults)
    assert not wrong, ", ".join(wrong)
    structure, values, model = found.levels
    assert (structure.unseen, values.unseen) == ((), ())
    return f"{NOT_ASKED}level model: {model.unseen[0]}" if model.unseen else None


def convert(checkpoint: Path, base: Path, output: Path, dtype: torch.dtype | None = None) -> str:
    ((_, stems),) = choose_stems(checkpoint, base, "main", "auto")
    (check,) = write_directories([plan_directory(checkpoint, output, base, stems, ExportOptions(dtype=dtype))])
    return check.compared


def assert_as_the_library_saves(directory: Path, base: Path) -> None:
    _assert_equal(load_file(directory / "model.safetensors"), load_file(base / "model.safetensors"))


def _assert_equal(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys(), f"names: {sorted(ours.keys() ^ theirs.keys())[:3]}"
    wrong = [name for name, value in theirs.items() if not _equal(ours[name], value)]
    assert not wrong, f"values: {wrong[:3]}"


def _assert_loads(directory: Path, model: Any, expected: Mapping[str, Tensor]) -> None:
    loaded, info = type(model).from_pretrained(directory, output_loading_info=True)
    wrong = {key: sorted(map(str, info[key]))[:2] for key in ("missing_keys", "unexpected_keys") if info[key]}
    assert not wrong, f"from_pretrained: {wrong}"
    state = loaded.state_dict()
    bad = [name for name, value in expected.items() if not _equal(state[name], value)]
    assert not bad, f"from_pretrained gives other values: {bad[:3]}"


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def _dcp_save(state: dict[str, Any], path: Path) -> None:
    dcp.save(state, checkpoint_id=path, no_dist=True)


def _try(result: Result, column: str, body: Callable[[], str | None], folder: Path) -> None:
    try:
        outcome = body() or RIGHT
    except Exception as error:  # whatever it is, it is wrong
        outcome = said(error)
    result.outcomes[column] = outcome.replace(str(folder), "...")


def said(error: BaseException) -> str:
    """An error in a line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' / '.join(lines)[-300:]}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(50)
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(level)
