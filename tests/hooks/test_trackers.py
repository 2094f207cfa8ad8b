"""The numbers of events in trackers: each with the real library, offline, read back as that library reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from shardsmith.hooks import EMA, Event, HFExport, Hooks, ShardedSave, every, latest, metrics_to

WAITED = "checkpoint/{}/seconds_waited"


def train(run: Path, on_event: Any, steps: int = 4) -> None:
    model = nn.Linear(4, 4)
    ema = EMA(model, decay=0.9)
    save = ShardedSave(run / "checkpoints", model=model, ema=ema, when=every(1), keep=latest(2))
    with Hooks(ema, save, HFExport(run / "hf", model=model, when=every(2)), on_event=on_event) as hooks:
        for step in range(1, steps + 1):
            hooks.step(step)


def scalars(directory: Path) -> dict[str, list[float]]:
    """Of all files, as TensorBoard shows them: Trainer closes its own before the last events are told."""
    shown: dict[str, list[float]] = {}
    for file in sorted(directory.rglob("*tfevents*"), key=lambda file: file.stat().st_mtime_ns):
        read = EventAccumulator(str(file))
        read.Reload()
        for tag in read.Tags()["scalars"]:
            shown.setdefault(tag, []).extend(scalar.value for scalar in read.Scalars(tag))
    return shown


def assert_shown(shown: dict[str, list[float]], events: list[Event]) -> None:
    """That each number of each event was logged, in order."""
    told: dict[str, list[float]] = {}
    for event in events:
        for name, value in event.metrics().items():
            told.setdefault(name, []).append(value)
    assert {"checkpoint/save/ema_distance", "checkpoint/remove/step", WAITED.format("export")} <= told.keys()
    assert {name: shown.get(name) for name in told} == {name: pytest.approx(values) for name, values in told.items()}


def test_mlflow_has_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file://{tmp_path}/mlruns")
    events: list[Event] = []
    with mlflow.start_run() as run:
        train(tmp_path, [metrics_to(mlflow.log_metrics), events.append])
    client = mlflow.MlflowClient()
    names = client.get_run(run.info.run_id).data.metrics
    shown = {name: [one.value for one in client.get_metric_history(run.info.run_id, name)] for name in names}
    assert_shown(shown, events)


def test_the_trackers_of_accelerate_have_every_number(tmp_path: Path) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path / "tb")
    accelerator.init_trackers("test")
    events: list[Event] = []
    train(tmp_path, [metrics_to(accelerator.log), events.append])
    accelerator.end_training()
    assert_shown(scalars(tmp_path / "tb"), events)


def test_the_loggers_of_trainer_have_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    from shardsmith.integrations.transformers import CheckpointHooks
    from tests.integrations.trainer_runs import make_data, make_model

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    events: list[Event] = []
    hooks = CheckpointHooks(ema_decay=0.9, export=every(2), keep=latest(1), on_event=events.append)
    arguments = transformers.TrainingArguments(
        str(tmp_path / "out"),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=1,
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        report_to=["tensorboard"],
    )
    data: Any = make_data()
    trainer = transformers.Trainer(make_model("llama"), arguments, train_dataset=data, callbacks=[hooks])
    hooks.log_to(trainer)
    trainer.train()
    logged = [record for record in trainer.state.log_history if any(name.startswith("checkpoint/") for name in record)]
    assert sum("loss" in record for record in trainer.state.log_history) == 4
    assert [record["step"] for record in logged] == [event.told_at for event in events]
    assert_shown({name.removeprefix("train/"): values for name, values in scalars(tmp_path / "tb").items()}, events)
