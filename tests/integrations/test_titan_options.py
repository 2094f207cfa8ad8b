from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from shardsmith.errors import UsageError
from shardsmith.integrations.torchtitan.help import help_text
from shardsmith.integrations.torchtitan.options import CheckpointHooks, name_of, parse


def test_without_options_nothing_is_attached() -> None:
    assert parse({}).is_idle
    assert parse({"prove_load": False}).is_idle


@pytest.mark.parametrize(
    ("options", "exports", "records"),
    [
        ({"metadata": True}, False, True),
        ({"ema_decay": 0.999}, False, True),  # an average that nobody can tell to be whole is of no use
        ({"ema_decay": 0}, False, True),  # a whole number does for a float
        ({"export_interval": 1000}, True, False),
        ({"engine": True, "weights": "huggingface", "export_base_model": "base"}, False, True),
        ({"export_last": True, "export_keep": 2, "export_max_shard_size": None}, True, False),
    ],
)
def test_what_is_attached_follows_from_the_options(options: dict[str, Any], exports: bool, records: bool) -> None:
    parsed = parse(options)
    assert (parsed.exports, parsed.records) == (exports, records)


def test_an_unknown_option_is_refused_with_a_list_of_those_there_are() -> None:
    with pytest.raises(UsageError, match="there is no option ema_decya, xport") as caught:
        parse({"ema_decya": 0.9, "xport": 3})
    assert all(field.name in str(caught.value) for field in fields(CheckpointHooks))


@pytest.mark.parametrize(
    ("options", "complaints"),
    [
        ({"ema_decay": "0.9", "metadata": 1}, ["ema_decay='0.9': float or None", "metadata=1: bool"]),
        ({"export_interval": True}, ["export_interval=True: int or None"]),
        ({"export_interval": 2, "export_ema_as": "files"}, ['export_ema_as=\'files\': "file" or "directory"']),
        ({"ema_warmup": True, "ema_offload": True}, ["ema_warmup needs ema_decay", "ema_offload needs ema_decay"]),
        (
            {"export_last": True, "export_lora": "adapter", "export_verify": "load"},
            ['export_verify="load" loads whole models'],
        ),
        ({"weights": "huggingface"}, ['weights="huggingface" needs engine']),
        ({"prewarm": True}, ["prewarm needs engine"]),
        (
            {"weights": "huggingface", "engine": True, "export_base_model": "base", "export_keep": 2},
            ["export_keep needs"],
        ),
        ({"weights_dtype": "bfloat16"}, ['weights_dtype is for weights="huggingface"']),
        ({"export_base_model": "base"}, ["export_base_model needs export_interval"]),
        ({"export_keep": 2}, ["export_keep needs export_interval or export_last"]),
        ({"export_interval": 2, "export_models": "both"}, ['export_models="both" needs ema_decay']),
        ({"allow_extra": "head.*"}, ["allow_extra='head.*': list of str is expected"]),
        ({"allow_missing": ["head.*"], "prove_load": False}, ["allow_missing needs prove_load"]),
        ({"export_interval": 0}, ["export_interval=0"]),
        ({"export_last": True, "export_keep": 0}, ["export_keep=0"]),
        (
            {"export_last": True, "export_folder": "nowhere://bucket/hf", "export_base_model": "nowhere://bucket/base"},
            [
                "export_folder='nowhere://bucket/hf': nowhere:// is",
                "export_base_model='nowhere://bucket/base': nowhere:// is",
            ],
        ),
        (
            {"export_last": True, "events": "s3://bucket/events.jsonl"},
            ["events='s3://bucket/events.jsonl': s3:// is not supported"],
        ),
    ],
)
def test_options_of_a_wrong_type_or_that_contradict_each_other_are_all_named(
    options: dict[str, Any], complaints: list[str]
) -> None:
    with pytest.raises(UsageError) as caught:
        parse(options)
    assert all(complaint in str(caught.value) for complaint in complaints), caught.value


def test_further_options_are_added_to_those_there_are() -> None:
    first = parse({"ema_decay": 0.9})
    assert parse({"export_interval": 2}, first) == parse({"ema_decay": 0.9, "export_interval": 2})


def test_the_documentation_says_of_every_option_what_the_help_says() -> None:
    table = (Path(__file__).parent.parent.parent / "docs" / "torchtitan.md").read_text()
    hints, help_words = get_type_hints(CheckpointHooks), " ".join(help_text().split())
    for field in fields(CheckpointHooks):
        (row,) = [line for line in table.splitlines() if line.startswith(f"| `{field.name}` |")]
        kind, default, meaning = row.removesuffix(" |").split(" | ")[1:]
        assert (kind, default) == (name_of(hints[field.name]), f"`{field.default!r}`")
        assert meaning in help_words


def test_the_help_explains_every_option() -> None:
    text = help_text()
    assert all(f"\n  {field.name}: " in text for field in fields(CheckpointHooks))
    assert "--override.imports" in text
    assert "[checkpoint_hooks]" in text
