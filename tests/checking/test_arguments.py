"""Arguments are checked when an object is made: each mistake with the message that it gets."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import numpy as np
import pytest
import torch
from torch import nn

from shardsmith.checking.arguments import check_options, checked
from shardsmith.checking.converting import convert
from shardsmith.checking.types import Count, Decay, Directory, LocalPath
from shardsmith.errors import UsageError
from shardsmith.hooks import (
    EMA,
    FolderSave,
    HFExport,
    Hooks,
    InitialLoad,
    Recorder,
    ShardedSave,
    at,
    every,
    last,
    latest,
    multiples_of,
)
from shardsmith.manager import ShardedCheckpointManager
from shardsmith.tensors.dtypes import parse_dtypes

MODEL = nn.Linear(2, 2)
OPTIMIZER = torch.optim.SGD(MODEL.parameters(), lr=0.1)


class NoState:
    """A learning rate schedule that somebody has written without thinking of checkpoints."""


def save(**wrong: Any) -> Callable[[], object]:
    return lambda: ShardedSave(**{"directory": "run", "model": MODEL, "when": every(5), **wrong})


def export(**wrong: Any) -> Callable[[], object]:
    return lambda: HFExport(**{"directory": "run", "model": MODEL, "when": every(5), **wrong})


MISTAKES: dict[str, tuple[Callable[[], object], str]] = {
    "a number for a schedule": (save(when=500), "ShardedSave: when=500: a Schedule is expected; write every(500)."),
    "as well for an export": (export(when=500), "HFExport: when=500: a Schedule is expected; write every(500)."),
    "steps for a schedule": (save(when=[20, 10]), "write at(10, 20)"),
    "a function for a schedule": (save(when=last), "when=the function last: a Schedule is expected; write last()"),
    "a word for a schedule": (save(when="last"), "write last()"),
    "a number for a retention": (save(keep=3), "keep=3: a Retention is expected; write latest(3)"),
    "minus one for a retention": (save(keep=-1), "write None, which keeps all"),
    "a scheduler without state": (
        save(scheduler=NoState()),
        "scheduler=a NoState: an object with state_dict and load_state_dict is expected, "
        "and a NoState has no state_dict and no load_state_dict",
    ),
    "a stateful without state": (save(stateful={"data": NoState()}), "stateful['data']=a NoState: an object with"),
    "a class for a model": (save(model=nn.Linear), "the class Linear: an object is expected, not a class"),
    "a state dict for a model": (save(model=MODEL.state_dict()), "model=an OrderedDict: a model (nn.Module)"),
    "a class for an optimizer": (save(optimizer=torch.optim.SGD), "write SGD(...)"),
    "no optimizer among optimizers": (save(optimizer=[OPTIMIZER, 3]), "optimizer[1]=3: an Optimizer is expected"),
    "a decay for an average": (save(ema=0.99), "ema=0.99: an EMA or None is expected"),
    "a class for an average": (save(ema=EMA), "write EMA(...)"),
    "a layout that is none": (save(layout="Nested"), '"flat" or "nested" is expected; did you mean "nested"?'),
    "a mode that is none": (save(async_mode="Async"), 'did you mean "async"?'),
    "True for a mode": (save(async_mode=True), 'async_mode=True: "async" or "disabled" is expected'),
    "no time to wait": (save(timeout_secs=0), "timeout_secs=0: a number of seconds above 0 is expected"),
    "a string for seconds": (save(timeout_secs="60"), "timeout_secs='60': a number is expected"),
    "a remote directory": (
        save(directory="nowhere://bucket/run"),
        "directory='nowhere://bucket/run': nowhere:// is not supported",
    ),
    "a remote path": (save(directory=Path("nowhere://bucket/run")), "nowhere:// is not supported"),
    "a home directory": (save(directory="~/run"), f"write {str(Path.home() / 'run')!r}"),
    "no directory": (save(directory=""), "a path is expected"),
    "remote exports": (export(directory="nowhere://me/model"), "nowhere:// is not supported"),
    "a remote base": (
        export(base_model="nowhere://bucket/base"),
        "base_model='nowhere://bucket/base': nowhere:// is not supported",
    ),
    "models that are none": (export(models="each"), 'models=\'each\': "main" or "ema" or "both" or "all" is expected'),
    "a chain of remote paths": (save(directory="simplecache::s3://bucket/run"), "s3:// is not supported"),
    "an optimizer for a scheduler": (save(scheduler=OPTIMIZER), "a schedule of the learning rate is expected"),
    "two schedules joined by and": (lambda: every(5) and last(), "join schedules with |"),
    "two schedules joined by or": (lambda: every(5) or last(), "join schedules with |"),
    "two policies joined by and": (lambda: latest(3) and multiples_of(5), "join what to keep with |"),
    "a processor without files": (
        export(processor=3),
        "processor with save_pretrained or None is expected",
    ),
    "half a word": (export(models="man"), 'did you mean "main"?'),
    "a place that is none": (export(ema_as="dir"), 'did you mean "directory"?'),
    "what to do when busy": (export(when_busy="drop"), '"wait" or "skip" or "raise" is expected'),
    "what to do on errors": (export(on_error="ignore"), '"raise" or "warn" is expected'),
    "adapters": (export(adapters="merge"), 'did you mean "merged"?'),
    "a check": (export(verify="all"), 'verify=\'all\': "digest" or "load" is expected'),
    "a way to write": (export(write_mode="slice"), 'did you mean "slices"?'),
    "a source": (export(source="lve"), 'did you mean "live"?'),
    "a dtype that is none": (export(dtype="bfloat61"), 'dtype "bfloat61": give a floating-point dtype'),
    "a dtype of integers": (export(dtype=torch.int8), 'dtype "torch.int8": give a floating-point dtype'),
    "a size that is none": (export(max_shard_size="5 tons"), "not a size: '5 tons'; write it like 5GB"),
    "a negative size": (export(max_shard_size=-5), "not a size: -5"),
    "names that are none": (export(names=5), "names=5: a string or a NameMap is expected"),
    "a word for a bool": (export(trust_remote_code="yes"), "True or False is expected"),
    "a folder for a hook": (export(checkpoints="run"), "a Saves or None is expected"),
    "a class for a hook": (lambda: Hooks(EMA), "the class EMA: an object is expected, not a class; write EMA(...)"),  # type: ignore[arg-type]
    "a list for hooks": (lambda: Hooks([EMA(MODEL)]), "write the hooks one by one, as in Hooks(ema, save)"),  # type: ignore[arg-type]
    "None for a hook": (lambda: Hooks(None), "hooks[0]=None: a Hook is expected"),  # type: ignore[arg-type]
    "a word for a signal": (lambda: Hooks(stop_on="SIGTERM"), "write signal.SIGTERM"),  # type: ignore[arg-type]
    "a decay of one": (lambda: EMA(MODEL, decay=1), "decay=1: a number from 0 to below 1"),
    "a string for a decay": (lambda: EMA(MODEL, decay="0.9"), "a number is expected"),  # type: ignore[arg-type]
    "no steps between updates": (lambda: EMA(MODEL, every_n_steps=0), "a whole number from 1 on is expected"),
    "half a step": (lambda: EMA(MODEL, start_step=1.5), "start_step=1.5: a whole number is expected"),  # type: ignore[arg-type]
    "parameters for a model": (lambda: EMA(MODEL.parameters()), "a model (nn.Module) is expected"),  # type: ignore[arg-type]
    "half a period": (lambda: every(0.5), "every: steps=0.5: a whole number is expected, and this is a float"),  # type: ignore[arg-type]
    "true for a period": (lambda: every(True), "this is a bool"),
    "a string for a step": (lambda: at(1, "2"), "at: steps[1]='2': a whole number is expected"),  # type: ignore[arg-type]
    "none to keep": (lambda: latest(0), "latest: count=0: a whole number from 1 on is expected"),
    "multiples of nothing": (lambda: multiples_of(-1), "multiples_of: steps=-1"),
    "a pattern for patterns": (
        lambda: InitialLoad("base", model=MODEL, allow_missing="*norm*"),
        "allow_missing='*norm*': a list of strings is expected; write ['*norm*']",
    ),
    "no model among models": (lambda: InitialLoad("base", model=[MODEL, 3]), "model[1]=3"),  # type: ignore[list-item]
    "a backend": (
        lambda: ShardedCheckpointManager("run", model=MODEL, backend="DCP"),  # type: ignore[arg-type]
        'did you mean "dcp"?',
    ),
    "a decay of a module": (
        lambda: ShardedCheckpointManager("run", model=MODEL, ema=MODEL, ema_decay=2),
        "ema_decay=2: a number from 0 to below 1",
    ),
    "a model for a folder": (lambda: FolderSave("run"), "FolderSave: model='run'"),  # type: ignore[arg-type]
    "a file for a directory": (lambda: Recorder(__file__, model=MODEL), "a directory is expected, but"),
    "a step that is none": (lambda: Hooks().step(1.5), "Hooks.step: step=1.5: a whole number is expected"),  # type: ignore[arg-type]
    "a step that no name has room for": (lambda: Hooks().step(2**62), r"4611686018427387904: a whole number from 0 on"),
    "a step before the first": (
        lambda: Hooks().step(np.int64(-1)),
        "a whole number from 0 on (at most 18 digits) is expected",
    ),  # type: ignore[arg-type]
}


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return nn.Linear(2, 2)


@pytest.mark.parametrize("make", [on_meta, lambda: nn.LazyLinear(2)], ids=["meta", "lazy"])
def test_a_model_without_values_is_named_also_without_hooks(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = make()
    save = ShardedSave(tmp_path / "steps", model=model, when=every(5))
    export = HFExport(tmp_path / "hf", model=model, when=every(5))
    manager = ShardedCheckpointManager(tmp_path / "own", model=model)
    calls = (partial(save.save, 1), partial(export.export, 1), partial(manager.save_sharded_checkpoint, 1))
    for call in (*calls, lambda: EMA(model)):
        with pytest.raises(UsageError, match="no values yet, such as weight: they are on the meta device, or"):
            call()
    assert not list(tmp_path.glob("*/*"))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_when_it_is_made(mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make, message = MISTAKES[mistake]
    with pytest.raises(UsageError, match=re.escape(message)):
        make()
    assert not list(tmp_path.iterdir())


def test_all_mistakes_of_a_call_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="3 arguments") as caught:
        save(directory=tmp_path, keep=3, layout="nest", async_mode="sync")()
    named = {line.strip().split("=")[0] for line in str(caught.value).splitlines()[1:-1]}
    assert named == {"keep", "layout", "async_mode"}


def test_an_unknown_argument_is_a_type_error_with_the_nearest_name() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'optimiser'; did you mean optimizer"):
        save(optimiser=OPTIMIZER)()


@pytest.mark.parametrize("cls", [ShardedSave, HFExport, FolderSave, ShardedCheckpointManager])
def test_every_choice_of_words_is_checked(cls: type, tmp_path: Path) -> None:
    hints = get_type_hints(cls.__init__, include_extras=True)
    if "options" in hints:  # **options: Unpack[...]
        hints |= get_type_hints(get_args(hints.pop("options"))[0], include_extras=True)
    choices = [name for name, hint in hints.items() if "Literal" in str(hint)]
    assert choices
    for name in choices:
        with pytest.raises(UsageError, match=f"{name}='no such word'"):
            cls(
                **{
                    **({} if cls is FolderSave else {"directory": tmp_path}),
                    **({"when": every(5)} if "when" in hints else {}),
                    "model": MODEL,
                    name: "no such word",
                }
            )


@pytest.mark.parametrize("five", [5, 5.0, np.int64(5), np.float32(5), torch.tensor(5), torch.tensor(5.0)])
def test_a_whole_number_of_any_type_is_that_number(five: Any) -> None:
    assert every(five) == every(5)
    assert type(convert(five, int)) is int
    hooks = Hooks()
    hooks.step(five)
    assert (hooks.steps_done, type(hooks.steps_done)) == (5, int)


def test_steps_that_are_no_python_ints_make_the_usual_directories(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    with Hooks(ShardedSave(tmp_path, model=model, when=every(1))) as hooks:
        for step in (np.int64(1), torch.tensor(2), 3e0):
            hooks.step(step)  # type: ignore[arg-type]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1", "step-2", "step-3"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "5", None, [5], torch.ones(2), True, 5.5, np.ones(2)])
def test_what_is_no_whole_number_is_refused(value: Any) -> None:
    with pytest.raises(UsageError, match="whole number"):
        every(value)


@pytest.mark.parametrize("name", ["bf16", "bfloat16", "torch.bfloat16", torch.bfloat16])
def test_a_dtype_may_be_written_in_every_usual_way(name: str | torch.dtype) -> None:
    assert parse_dtypes(name) is torch.bfloat16
    assert parse_dtypes({"*": name}) == {"*": torch.bfloat16}


def test_generators_of_optimizers_numbers_of_signals_and_bytes_are_taken(tmp_path: Path) -> None:
    ShardedSave(tmp_path, model=MODEL, when=every(5), optimizer=(one for one in [OPTIMIZER])).close()
    HFExport(tmp_path / "hf", model=MODEL, when=every(5), max_shard_size=5_000_000, dtype=torch.bfloat16).close()
    hooks = Hooks(stop_on=signal.SIGUSR1.value)  # type: ignore[arg-type]
    hooks.close()


def test_options_of_a_mapping_are_checked_by_name_and_value() -> None:
    with pytest.raises(UsageError, match="2 arguments") as caught:
        check_options("Trainer", EMA, {"deacy": 0.9, "warmup": 1}, "ema_options: ")
    assert "ema_options: deacy: there is no such option; did you mean decay?" in str(caught.value)
    assert "ema_options: warmup=1: True or False is expected" in str(caught.value)


def test_what_is_right_is_passed_on_as_it_is() -> None:
    @checked
    def take(
        where: Directory,
        *more: Count,
        base: LocalPath | None = None,
        mode: Literal["a", "b"] = "a",
        decay: Decay = 0.5,
        **rest: int,
    ) -> tuple[Any, ...]:
        return where, more, base, mode, decay, rest

    assert take("run", 1, 2, mode="b", x=3) == (Path("run"), (1, 2), None, "b", 0.5, {"x": 3})
    assert get_args(Decay)[0] is float
