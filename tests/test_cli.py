from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shardsmith.cli import main
from shardsmith.commands import COMMANDS
from tests.trained_runs import Trained

HEAVY = {"torch", "transformers", "safetensors", "numpy"}


def places(run: Trained, output: Path) -> list[str]:
    return [
        *("--checkpoint_dir", str(run.checkpoint)),
        *("--output_dir", str(output)),
        *("--base_model_path", str(run.base)),
    ]


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", [["--help"], ["to-hf", "--help"], ["inspect", "-h"], ["nonsense"], ["to-hf"]])
def test_help_and_usage_errors_import_nothing_heavy(arguments: list[str]) -> None:
    code = f"import atexit, sys; atexit.register(lambda: print({HEAVY!r} & set(sys.modules)))\n"
    ran = python("-c", f"{code}from shardsmith.cli import main; main({arguments!r})")
    assert ran.returncode == (0 if arguments[-1] in ("--help", "-h") else 2)
    assert ran.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert f"Example: shardsmith {command} " in capsys.readouterr().out


def test_it_runs_as_a_module(odd: Trained) -> None:
    ran = python("-m", "shardsmith.cli", "detect", str(odd.checkpoint))
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout == "sharded: metadata.json of step 3, main, ema\n"


def test_a_failure_is_the_exit_code_of_the_process(tmp_path: Path) -> None:
    ran = python("-m", "shardsmith.cli", "detect", str(tmp_path / "x"))
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.splitlines() == [
        "shardsmith: CheckpointNotFoundError",
        f"{tmp_path / 'x'}: there is no such file or directory",
    ]


def test_dashes_and_underscores_are_the_same(odd: Trained, output: Path) -> None:
    options = [*places(odd, output), "--max_shard_size", "5GB", "--no_verify", "--ema_as", "file", "--quiet"]
    assert main(["to-hf", *options]) == 0
    dashes = [option.replace("_", "-") if option.startswith("--") else option for option in options]
    dashes[dashes.index(str(output))] = str(output.with_name("second"))
    assert main(["to-hf", *dashes]) == 0
    for name in ("model.safetensors", "ema.safetensors"):
        assert (output / name).read_bytes() == (output.with_name("second") / name).read_bytes()


@pytest.mark.parametrize("options", [[], ["--ema_as", "directory"]], ids=["one directory", "two directories"])
def test_a_dry_run_says_what_would_be_written_and_writes_nothing(
    options: list[str], odd: Trained, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["to-hf", *places(odd, output), "--dry_run", *options]) == 0
    printed = capsys.readouterr().out
    assert f"would write {output} from {odd.checkpoint} and {odd.base}" in printed
    assert (f"would write {output}-ema from" in printed) == bool(options)
    assert "nothing was written" in printed
    assert os.listdir(output.parent) == []
    dry = {line for line in printed.splitlines() if line.startswith("│")}
    assert main(["to-hf", *places(odd, output), *options]) == 0
    assert dry <= {line for line in capsys.readouterr().out.splitlines() if line.startswith("│")}


def test_a_dry_run_refuses_what_the_run_would_refuse(
    odd: Trained, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output.mkdir()
    assert main(["to-hf", *places(odd, output), "--dry_run"]) == 2
    assert "exists already" in capsys.readouterr().err


def test_the_summary_names_files_ties_and_what_is_not_averaged(
    trained: dict[tuple[str, int], Trained], output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained["qwen2", 2]
    assert main(["to-hf", *places(run, output)]) == 0
    printed = capsys.readouterr().out
    assert f"wrote {output} from {run.checkpoint} and {run.base}" in printed
    for name in ("model.safetensors", "ema.safetensors", "tokenizer.json", "from the base model"):
        assert name in printed
    assert "ema: lm_head.weight is tied to model.embed_tokens.weight, which alone is in the file" in printed
    assert main(["to-hf", *places(trained["odd", 2], output.with_name("odd"))]) == 0
    assert "ema: 6 tensors that are not averaged are from main" in capsys.readouterr().out


def test_quiet_prints_nothing(odd: Trained, output: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["to-hf", *places(odd, output), "--quiet"]) == 0
    assert capfd.readouterr() == ("", "")


def test_a_file_that_may_not_be_read_is_an_error_and_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = tmp_path / ("x" * 300)  # as root, nothing is forbidden; too long a name is refused to everybody
    assert main(["detect", str(name)]) == 2
    assert "File name too long" in capsys.readouterr().err
