"""Resumes that take up a part of a checkpoint, an earlier one, or that of another run."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shardsmith.errors import CheckpointNotFoundError, IncompleteCheckpointError, MismatchError, UsageError
from shardsmith.formats.adopt import adopt
from shardsmith.hooks import EMA, Hooks, ShardedSave, every
from shardsmith.manifest.checkpoints import committed_steps
from tests.dcp_directories import save


class Run:
    """A small training whose parts can be chosen."""

    def __init__(
        self,
        directory: Path,
        *,
        decay: float | None = None,
        optimizer: type[torch.optim.Optimizer] | None = torch.optim.AdamW,
        ema_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        torch.manual_seed(3)
        self.model = nn.Linear(3, 3)
        self.optimizer = (optimizer or torch.optim.AdamW)(self.model.parameters(), lr=0.1)
        self.ema = EMA(self.model, decay=decay, **(ema_options or {})) if decay is not None else None
        parts = {"optimizer": self.optimizer if optimizer else None, "ema": self.ema}
        save = ShardedSave(directory, model=self.model, when=every(1), async_mode="disabled", **parts, **options)
        self.hooks = Hooks(*([self.ema] if self.ema else []), save)

    def train(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            self.model(torch.full((2, 3), float(step))).sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.hooks.step(step)

    @property
    def weight(self) -> torch.Tensor:
        return self.model.weight.detach().clone()


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Run]:
    """Steps 1 to 3 with AdamW and no average, and the run that made them."""
    run = Run(tmp_path / "run")
    run.train(1, 3)
    run.hooks.close(broken_off=True)
    return tmp_path / "run", run


def test_an_average_can_be_added_to_a_run_that_had_none(saved: tuple[Path, Run]) -> None:
    directory, before = saved
    with pytest.raises(MismatchError, match=r'(?s)has no ema.*hooks\.resume\(on_missing="start"\)') as caught:
        Run(directory, decay=0.9).hooks.resume()
    assert caught.value.problems == ["ema: this run has one, the checkpoint has none"]
    run = Run(directory, decay=0.9, on_missing="start")
    assert run.hooks.resume() == 3
    assert torch.equal(run.weight, before.weight)
    assert run.ema is not None
    assert torch.equal(run.ema.model_state_dict()["weight"], before.weight)
    run.train(4, 4)
    again = Run(directory, decay=0.9)
    assert again.hooks.resume() == 4
    assert again.ema is not None
    assert again.ema.updates == 1
    assert Run(directory / ".." / "other", decay=0.9).hooks.resume(directory=directory, on_missing="start") == 4


def test_a_decay_can_be_changed_by_name(tmp_path: Path) -> None:
    Run(tmp_path, decay=0.9).train(1, 2)
    with pytest.raises(UsageError, match=r'decay 0\.9, this one has decay 0\.5.*on_other_decay="continue"'):
        Run(tmp_path, decay=0.5).hooks.resume()
    run = Run(tmp_path, decay=0.5, ema_options={"on_other_decay": "continue"})
    assert run.hooks.resume() == 2
    assert run.ema is not None
    assert (run.ema.updates, run.ema.decay) == (2, 0.5)


@pytest.mark.parametrize("other", [torch.optim.Adagrad, torch.optim.SGD, torch.optim.RMSprop])
def test_another_optimizer_is_told_how_to_go_on_without_the_old_one(
    saved: tuple[Path, Run], caplog: pytest.LogCaptureFixture, other: type[torch.optim.Optimizer]
) -> None:
    directory, before = saved
    message = r"the optimizer of this run is not the one that was saved.*hooks\.resume\(parts=\('model', 'rng'\)\)"
    run = Run(directory, optimizer=other)
    start = run.weight
    with pytest.raises(MismatchError, match=re.compile(message, re.DOTALL)):
        run.hooks.resume()
    assert torch.equal(run.weight, start)
    with caplog.at_level(logging.INFO):
        assert Run(directory, optimizer=other).hooks.resume(parts=["model", "rng"]) == 3
    assert "step-3: model, rng, without optimizer" in caplog.text
    run = Run(directory)
    assert run.hooks.resume(parts=["model"]) == 3
    assert torch.equal(run.weight, before.weight)
    assert not run.optimizer.state


def test_what_is_missing_of_an_average_is_not_laid_to_the_model(tmp_path: Path) -> None:
    """A directory with averages and without their count, as of a tool that writes weights alone."""
    run = Run(tmp_path, decay=0.9)
    assert run.ema is not None
    weights = run.model.state_dict()
    state = {**weights, "ema_model": run.ema.model_state_dict(), "train_state": {"step": torch.tensor(3)}}
    adopt(save(state, tmp_path / "step-3"), step=3)
    run.hooks.close(broken_off=True)
    message = r"(?s)the ema of this run is not the one .*ema_state\.updates.*hooks\.resume\(parts=\('model',\)\)"
    with pytest.raises(MismatchError, match=message):
        Run(tmp_path, decay=0.9).hooks.resume(parts=["model", "ema"])
    assert Run(tmp_path, decay=0.9).hooks.resume(parts=("model",)) == 3


def test_a_part_that_the_run_does_not_have_is_refused(saved: tuple[Path, Run]) -> None:
    with pytest.raises(UsageError, match="this run has no ema, waegihts; it has model, optimizer, rng"):
        Run(saved[0]).hooks.resume(parts=["waegihts", "ema"])
    with pytest.raises(UsageError, match=r"write \['model'\]"):
        Run(saved[0]).hooks.resume(parts="model")
    with pytest.raises(UsageError, match=r"resume\(step=...\) needs a hook that saves"):
        Hooks().resume(step=1)


def test_an_earlier_step_can_be_taken_and_later_ones_are_kept_aside(saved: tuple[Path, Run]) -> None:
    directory, before = saved
    run = Run(directory)
    assert run.hooks.resume(step=1) == 1
    assert committed_steps(directory) == [1]
    assert len(list(directory.glob(".step-[23].superseded-*"))) == 2
    run.train(2, 3)
    assert torch.equal(run.weight, before.weight)
    with pytest.raises(CheckpointNotFoundError, match="step-7: is not a committed checkpoint; there: step-1, step-2"):
        Run(directory).hooks.resume(step=7)


def test_a_step_that_was_asked_for_and_is_damaged_is_not_replaced_by_another(saved: tuple[Path, Run]) -> None:
    directory, _ = saved
    data = next((directory / "step-2").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1] + b"x")
    with pytest.raises(IncompleteCheckpointError, match="every checkpoint is damaged: step-2"):
        Run(directory).hooks.resume(step=2)
    assert committed_steps(directory) == [1, 2, 3]


def test_a_run_can_begin_where_another_one_was(saved: tuple[Path, Run], tmp_path: Path) -> None:
    directory, before = saved
    run = Run(tmp_path / "new")
    assert run.hooks.resume(directory=directory) == 3
    assert torch.equal(run.weight, before.weight)
    run.train(4, 4)
    assert committed_steps(tmp_path / "new") == [4]
    assert committed_steps(directory) == [1, 2, 3]
    with pytest.raises(CheckpointNotFoundError, match="holds no checkpoint"):
        Run(tmp_path / "newer").hooks.resume(directory=tmp_path / "empty")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"lr": 1e-2, "weight_decay": 0.1}, None),
        ({"lr": 1e-2, "weight_decay": 0.3}, "optimizer: weight_decay 0.1 (here 0.3)"),
        ({"lr": 7e-5, "weight_decay": 0.1}, "optimizer: initial_lr 0.01 (here 7e-05)"),
        ({"lr": 1e-2, "weight_decay": 0.1, "period": 1000}, "scheduler: T_max 10 (here 1000)"),
    ],
)
def test_settings_of_the_script_that_the_checkpoint_replaces_are_told(
    settings: dict[str, Any], told: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")

    def hooks_of(lr: float, weight_decay: float, period: int = 10) -> Hooks:
        model = nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, period)
        optimizer.step()
        scheduler.step()
        return Hooks(ShardedSave(tmp_path, model=model, optimizer=optimizer, scheduler=scheduler, when=every(1)))

    with hooks_of(1e-2, 0.1) as hooks:
        hooks.step(1)
    assert hooks_of(**settings).resume() == 1
    lines = [line for line in caplog.messages if line.startswith("settings of the checkpoint replace")]
    assert len(lines) == (told is not None)
    assert told is None or told in lines[0]


@pytest.mark.parametrize("changed", [lambda: nn.Linear(2, 3), lambda: nn.Linear(2, 2).bfloat16()])
def test_another_model_is_told_how_to_begin_from_the_weights(changed: Callable[[], nn.Module], tmp_path: Path) -> None:
    with Hooks(ShardedSave(tmp_path, model=nn.Linear(2, 2), when=every(1))) as hooks:
        hooks.step(1)
    hooks = Hooks(ShardedSave(tmp_path, model=changed(), when=every(1)))
    with pytest.raises(MismatchError, match=r"(?s)the model of this run is not the one .*load them with InitialLoad"):
        hooks.resume()


class Tied(nn.Module):
    """With an output that is the embedding, or is not."""

    def __init__(self, is_tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        if is_tied:
            self.head.weight = self.embed.weight


@pytest.mark.parametrize("layout", ["flat", "nested"])
@pytest.mark.parametrize("parts", [None, ["model"], ["ema"]])
def test_weights_that_were_apart_are_not_loaded_over_each_other(
    parts: list[str] | None, layout: Any, tmp_path: Path
) -> None:
    def hooks(is_tied: bool) -> tuple[Tied, Hooks]:
        model = Tied(is_tied)
        ema = EMA(model, decay=0.5)
        return model, Hooks(ema, ShardedSave(tmp_path, model=model, ema=ema, when=every(1), layout=layout))

    with hooks(is_tied=False)[1] as apart:
        apart.step(1)
    model, tied = hooks(is_tied=True)
    before = model.embed.weight.detach().clone()
    with pytest.raises(MismatchError, match=r"head\.weight: one with .*embed\.weight in this model, another in the"):
        tied.resume(parts=parts)
    assert torch.equal(model.embed.weight, before)
    tied.close(broken_off=True)


def test_weights_that_were_apart_and_equal_are_taken_as_tied(tmp_path: Path) -> None:
    apart = Tied(is_tied=False)
    apart.head.load_state_dict({"weight": apart.embed.weight})
    with Hooks(ShardedSave(tmp_path, model=apart, when=every(1))) as hooks:
        hooks.step(1)
    model = Tied(is_tied=True)
    with Hooks(ShardedSave(tmp_path, model=model, when=every(1))) as hooks:
        assert hooks.resume() == 1
    assert torch.equal(model.embed.weight, apart.embed.weight)


class Layers:
    """A training of two layers and a BatchNorm, of which parts can be left out."""

    def __init__(
        self,
        directory: Path,
        *,
        head: bool = True,
        frozen: bool = False,
        held: bool = True,
        buffers: bool = True,
        momentum: float = 0.9,
        scheduler: bool = True,
    ) -> None:
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), *([nn.Linear(3, 3)] if head else []))
        self.model[0].requires_grad_(not frozen)
        self.ema = EMA(self.model, decay=0.9, buffers=buffers)
        self.optimizer = torch.optim.SGD(self.model[0 if held else 1 :].parameters(), lr=0.1, momentum=momentum)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9) if scheduler else None
        self.save = ShardedSave(
            directory,
            model=self.model,
            ema=self.ema,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            when=every(1),
            async_mode="disabled",
        )
        self.hooks = Hooks(self.ema, self.save)

    def train(self, first: int, last: int) -> list[torch.Tensor]:
        for step in range(first, last + 1):
            self.model(torch.arange(6.0).reshape(2, 3) * step).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.scheduler is not None:
                self.scheduler.step()
            self.hooks.step(step)
        return [*self.ema.model_state_dict().values(), *self.model.state_dict().values()]


@pytest.mark.parametrize(
    ("changed", "problems"),
    [
        ({"head": False}, {"2.weight", "ema_model.2.bias"}),
        ({"frozen": True}, {"ema_model.0.weight", "ema_model.0.bias"}),
        ({"buffers": False}, {"ema_model.1.running_mean", "ema_model.1.running_var"}),
        ({"momentum": 0.0}, {"optimizer.state.0.weight.momentum_buffer"}),
    ],
    ids=lambda case: next(iter(case)) if isinstance(case, dict) else "",
)
def test_what_a_checkpoint_has_and_the_run_has_not_is_refused(
    tmp_path: Path, changed: dict[str, Any], problems: set[str]
) -> None:
    Layers(tmp_path).train(1, 2)
    run = Layers(tmp_path, **changed)
    before = [value.clone() for value in run.model.state_dict().values()]
    with pytest.raises(MismatchError, match=r"(?s)is not the one that was saved.*Nothing was loaded") as caught:
        run.hooks.resume()
    named = {line.split(":")[0] for line in caught.value.problems}
    assert problems <= named
    assert all(" in the checkpoint, not " in line for line in caught.value.problems)
    assert all(torch.equal(one, other) for one, other in zip(before, run.model.state_dict().values(), strict=True))
    parts = {name.partition(".")[0] for name in named} & {"optimizer", "ema_model"}
    if {name.partition(".")[0] for name in named} == parts:  # what the advice says, where the model is the same
        left = [part for part in ("model", "ema", "optimizer") if part not in {one.split("_")[0] for one in parts}]
        assert Layers(tmp_path, **changed).hooks.resume(parts=left) == 2
    again = Layers(tmp_path)
    assert again.hooks.resume() == 2
    straight = Layers(tmp_path / "straight").train(1, 4)
    assert all(torch.equal(one, other) for one, other in zip(straight, again.train(3, 4), strict=True))


def test_the_state_of_parameters_that_no_optimizer_holds_now_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Layers(tmp_path).train(1, 2)
    with caplog.at_level(logging.WARNING):
        assert Layers(tmp_path, held=False).hooks.resume() == 2
    assert "the optimizer's state of 0.weight, 0.bias, which no optimizer of this run holds" in caplog.text


def test_a_part_of_the_checkpoint_that_the_run_has_not_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Layers(tmp_path).train(1, 2)
    with caplog.at_level(logging.WARNING):
        assert Layers(tmp_path, scheduler=False).hooks.resume() == 2
    assert (
        "step-2 holds a state of the scheduler, and ShardedSave(scheduler=...) was not given: it is not loaded"
        in caplog.text
    )


def test_parameters_of_one_group_that_were_saved_with_several_settings_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def hooks(*, apart: bool) -> Hooks:
        model = nn.Linear(3, 3)
        groups = [{"params": [model.weight]}, {"params": [model.bias], "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups if apart else model.parameters(), lr=0.1, weight_decay=0.1)
        return Hooks(ShardedSave(tmp_path, model=model, optimizer=optimizer, when=every(1)))

    with hooks(apart=True) as saving:
        saving.step(1)
    assert hooks(apart=True).resume() == 1
    assert "several settings" not in caplog.text
    assert hooks(apart=False).resume() == 1
    assert "with several settings: weight_decay 0.1 and 0.0 (now 0.1), from weight on. To go on" in caplog.text


def of_linear(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Linear(3, 3)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def train_all(hooks: Hooks, trained: list[tuple[nn.Module, torch.optim.Optimizer]], first: int, last: int) -> None:
    for step in range(first, last + 1):
        for model, optimizer in trained:
            model(torch.full((2, 3), float(step))).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        hooks.step(step)


@pytest.mark.parametrize("often_first", [True, False])
def test_of_two_places_of_one_run_the_newest_step_is_taken(tmp_path: Path, often_first: bool) -> None:
    """Frequent steps on one disk, rare ones on another."""

    def hooks(trained: tuple[nn.Module, torch.optim.Optimizer]) -> Hooks:
        model, optimizer = trained
        saves = [
            ShardedSave(tmp_path / name, model=model, optimizer=optimizer, when=every(steps))
            for name, steps in (("often", 1), ("rare", 2))
        ]
        return Hooks(*(saves if often_first else reversed(saves)))

    trained = of_linear()
    with hooks(trained) as saving:
        train_all(saving, [trained], 1, 3)
    again = of_linear(seed=1)
    with hooks(again) as resumed:
        assert resumed.resume() == 3
        assert torch.equal(again[0].weight, trained[0].weight)
        train_all(resumed, [again], 4, 4)
    straight = of_linear()
    train_all(Hooks(), [straight], 1, 4)
    assert torch.equal(again[0].weight, straight[0].weight)


def test_two_models_of_different_steps_are_refused_with_the_step_of_both(tmp_path: Path) -> None:
    """As after a crash between the saves of two models."""

    def hooks(trained: list[tuple[nn.Module, torch.optim.Optimizer]]) -> Hooks:
        return Hooks(
            *[
                ShardedSave(tmp_path / f"{i}", model=model, optimizer=optimizer, when=every(i))
                for i, (model, optimizer) in enumerate(trained, 1)
            ]
        )

    trained = [of_linear(), of_linear(seed=1)]
    with hooks(trained) as saving:
        train_all(saving, trained, 1, 3)
    pattern = r"(?s)1'\) is at step 3.*2'\) is at step 2\n.*resume\(step=2\) goes back to the newest step of all"
    with pytest.raises(UsageError, match=pattern):
        hooks([of_linear(), of_linear(seed=1)]).resume()
    again = [of_linear(seed=2), of_linear(seed=3)]
    with hooks(again) as resumed:
        assert resumed.resume(step=2) == 2
        train_all(resumed, again, 3, 3)
    for (model, _), (other, _) in zip(trained, again, strict=True):
        assert torch.equal(model.weight, other.weight)
