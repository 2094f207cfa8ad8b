from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.checkpoint as dcp

from shardsmith.cli import main
from shardsmith.commands import COMMANDS
from shardsmith.commands.options import FORMER_NAMES, with_present_names
from tests.trained_runs import Trained
from tests.unreadable import UNREADABLE

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


@pytest.mark.parametrize("command", ["to-hf --checkpoint {broken} --base-model {base} --output-dir {output}"])
def test_an_error_about_damaged_files_says_what_to_do(
    command: str, odd: Trained, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = shutil.copytree(odd.checkpoint, tmp_path / "broken")
    file = next(broken.glob("*.distcp"))
    os.truncate(file, file.stat().st_size - 1000)
    assert main(command.format(broken=broken, base=odd.base, output=output).split()) == 2
    assert capsys.readouterr().err.endswith(
        "Nothing was written. Copy the files again, or take another step: `shardsmith inspect RUN` lists the steps.\n"
    )
    assert not output.exists()


@pytest.mark.parametrize(
    ("base", "advice"),
    [
        ("allenai/OLMo-2-0425-1B", "hf download allenai/OLMo-2-0425-1B --local-dir DIRECTORY"),
        ("no/such/base", "give the directory of the base model"),
    ],
)
def test_a_base_model_that_is_not_there_says_how_to_get_it(
    base: str, advice: str, odd: Trained, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["to-hf", "--checkpoint", str(odd.checkpoint), "--base-model", base, "--output-dir", str(output)]
    assert main(words) == 2
    assert capsys.readouterr().err.rstrip().endswith(advice)


def test_the_config_of_a_base_model_is_answered_with_its_directory(
    odd: Trained, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["to-hf", "--checkpoint", str(odd.checkpoint), "--output-dir", str(output), "--base-model"]
    assert main([*words, str(odd.base / "config.json")]) == 2
    directory = capsys.readouterr().err.rstrip().rpartition("the directory that it is in, ")[2]
    assert main([*words, directory]) == 0


@pytest.mark.parametrize("words", [["detect"], ["inspect"], ["verify"], ["clean"]], ids=" ".join)
def test_what_may_not_be_read_is_named_with_what_to_do(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = Path.stat

    def refuse(path: Path, **options: bool) -> os.stat_result:
        if path == tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied", str(path / "metadata.json"))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", refuse)  # tests may run as root, who may read everything
    assert main([*words, str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"shardsmith: CheckpointError\n{tmp_path}/metadata.json: Permission denied\n"
        f"Nothing was written. This user may not read it: `ls -ld {tmp_path}` shows who may.\n"
    )


@pytest.mark.parametrize("words", [["detect"], ["inspect"], ["verify"], ["clean"]], ids=" ".join)
@pytest.mark.parametrize("failing", ["stat", "listdir,scandir"])
def test_a_disk_error_is_named_with_what_to_do(
    failing: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = tmp_path / "step-4"
    step.mkdir()

    def broken(original: Callable[..., Any]) -> Callable[..., Any]:
        def fail(path: Any = ".", *args: Any, **options: Any) -> Any:
            if not isinstance(path, int) and Path(path) == step:
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
            return original(path, *args, **options)

        return fail

    for name in failing.split(","):
        monkeypatch.setattr(os, name, broken(getattr(os, name)))
    assert main([*words, str(step)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"shardsmith: CheckpointError\n{step}: Input/output error\nNothing was written. The disk ")
    assert "take another step or a copy on another disk" in said


def test_one_step_that_cannot_be_read_does_not_keep_a_run_from_being_cleaned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / f".step-4.tmp-{'0' * 16}").mkdir()
    for place, (make, _) in enumerate(UNREADABLE.values()):
        make(tmp_path / f"step-{place}")
        (tmp_path / "notes.txt").unlink(missing_ok=True)
    assert main(["clean", str(tmp_path)]) == 0
    assert "1 can be deleted" in capsys.readouterr().out


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
    name = tmp_path / ("x/" * 3000)  # as root, nothing is forbidden; too long a path is refused to everybody
    assert main(["detect", str(name)]) == 2
    assert "File name too long" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_the_list_of_commands_has_one_line_for_each(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if f"• {command} " in line)
    assert lines[at].rstrip(" │").endswith(".")
    assert not lines[at + 1].strip(" │") or "•" in lines[at + 1] or "╰" in lines[at + 1]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_dashes_and_present_names(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    flags = set(re.findall(r"(?<![\w-])--[a-z_-]+", capsys.readouterr().out))
    assert not [flag for flag in flags - {"--nproc_per_node"} if "_" in flag]
    assert not flags & (FORMER_NAMES.get(command, {}).keys() - {"--checkpoint"})


@pytest.mark.parametrize("command", FORMER_NAMES)
def test_every_former_name_of_an_option_is_taken(command: str) -> None:
    for former, name in FORMER_NAMES[command].items():
        spellings = [former, former.replace("-", "_").replace("__", "--", 1)]
        assert [with_present_names(command, [option]) for option in spellings] == [[name], [name]]
        assert with_present_names(command, [f"{former}=x", "x"]) == [f"{name}=x", "x"]


def test_a_flag_that_took_a_value_formerly_still_does() -> None:
    for value, present in {"True": ["--trained"], "False": ["--no-trained"], "None": []}.items():
        for former in ([f"--trained={value}"], ["--trained", value]):
            assert with_present_names("diagnose", ["--level", "all", *former, "--json"]) == [
                *("--level", "all"),
                *present,
                "--json",
            ]
    for arguments in (["--trained", "--json"], ["--trained"], ["--config", "True"]):
        assert with_present_names("diagnose", arguments) == arguments


def test_the_version_is_that_of_the_package_and_needs_no_torch() -> None:
    code = f"import atexit, sys; atexit.register(lambda: print({HEAVY!r} & set(sys.modules)))\n"
    ran = python("-c", f"{code}from shardsmith.cli import main; main(['--version'])")
    assert ran.stdout == f"shardsmith {importlib.metadata.version('shardsmith')}\nset()\n"


def test_an_unknown_format_is_exit_code_1_and_json_says_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["detect", str(tmp_path)]) == 1
    assert main(["detect", str(tmp_path), "--json"]) == 1
    plain, as_json = capsys.readouterr().out.splitlines()
    found = json.loads(as_json)
    assert plain == f"{found['format']}: {found['reason']}"
    assert (found["path"], found["format"]) == (str(tmp_path), "unknown")


@pytest.mark.parametrize("checkpoint", ["/checkpoint", "/", "/a/.."])
def test_a_checkpoint_in_no_folder_needs_an_output(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["to-hf", "--checkpoint", checkpoint, "--base-model", "base"]) == 2
    assert "--output-dir" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "options", [["nowhere://bucket/x"], ["--output-dir", "nowhere://bucket/x"], ["--model=nowhere://me/x"]]
)
def test_a_url_is_refused_by_name_and_no_folder_is_made_of_it(
    command: str,
    options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([command, *options]) == 2
    error = capsys.readouterr().err
    assert re.search(r"(path|--output-dir|--(base-)?model)='nowhere://\S+': nowhere:// is not supported", error), error
    assert not list(tmp_path.iterdir())


def test_a_reader_that_has_seen_enough_ends_it_without_a_word() -> None:
    script = f"{sys.executable} -m shardsmith to-hf --help | head -1; echo ${{PIPESTATUS[0]}}"
    ran = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert ran.stderr == ""
    assert ran.stdout.splitlines()[-1] in ("0", "141")


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_tables_are_whole_in_every_encoding(encoding: str, odd: Trained) -> None:
    command = [sys.executable, "-m", "shardsmith", "inspect", str(odd.checkpoint)]
    environment = os.environ | {"PYTHONIOENCODING": encoding, "COLUMNS": "80"}
    ran = subprocess.run(command, capture_output=True, text=True, check=False, encoding="utf-8", env=environment)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "…" not in ran.stdout
    assert ran.stdout.isascii() == (encoding == "ascii")


@pytest.mark.parametrize("module", ["transformers", "accelerate"])
def test_a_missing_extra_is_named_with_the_command_that_installs_it(module: str) -> None:
    code = f"import sys; sys.modules[{module!r}] = None; import shardsmith.integrations.{module}"
    ran = python("-c", code)
    assert ran.returncode == 1
    assert f"pip install 'shardsmith[{module}]'" in ran.stderr.splitlines()[-1]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("verify {checkpoint} {base} --logits", 2),
        ("diagnose --checkpoint {checkpoint} --base-model {base}", 2),
        ("to-dcp --base-model {base} --output-dir {output}", 0),
    ],
)
def test_what_needs_a_missing_package_names_the_command_that_installs_it(
    command: str, code: int, tmp_path: Path
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=16))
    model.save_pretrained(tmp_path / "base")
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    places = {name: tmp_path / name for name in ("checkpoint", "base", "output")}
    words = command.format(**places).split()
    without = "import sys; sys.modules['transformers'] = None; from shardsmith.cli import main; "
    ran = python("-c", f"{without}sys.exit(main({words!r}))")
    assert ran.returncode == code, ran.stderr
    said = " ".join((ran.stdout + ran.stderr).split())
    assert "transformers is not installed; run: pip install 'shardsmith[transformers]'" in said
