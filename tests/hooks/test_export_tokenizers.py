"""A tokenizer that is given beside a base model: the directory's is that one, whatever the base has of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from tests.hf.test_directory_check import export_live, llama

pytestmark = pytest.mark.filterwarnings("ignore")
CHARACTERS = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz .!"]
LEFT_BY_OLDER_LIBRARIES = {
    "special_tokens_map.json": json.dumps({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
    "added_tokens.json": json.dumps({"zz": 46}),
    "additional_chat_templates/tool.jinja": "old",
    "vocab.json": json.dumps({name: i for i, name in enumerate(CHARACTERS)}),
    "merges.txt": "#version: 0.2\n",
}


def tokenizer(**special: str) -> Any:
    vocabulary = {name: i for i, name in enumerate(CHARACTERS)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, **({"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"} | special)
    )


def described(directory: Path) -> tuple[Any, ...]:
    """What a directory's tokenizer is, and makes of a text."""
    loaded = AutoTokenizer.from_pretrained(directory)
    ids = loaded("some <|x|> text <|end|>").input_ids
    return loaded.get_vocab(), loaded.special_tokens_map, loaded.chat_template, ids


def test_the_given_tokenizer_is_that_of_the_directory(tmp_path: Path) -> None:
    model, base = llama(), tmp_path / "base"
    model.save_pretrained(base)
    tokenizer().save_pretrained(base)
    for name, text in LEFT_BY_OLDER_LIBRARIES.items():
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(text)
    (base / "preprocessor_config.json").write_text("{}")  # of images: no tokenizer has it
    given = tokenizer()
    given.add_special_tokens({"eos_token": "<|end|>", "additional_special_tokens": ["<|x|>"]})
    given.chat_template = "new"
    given.save_pretrained(tmp_path / "given")
    directory = export_live(model, base, tmp_path / "live", processor=given)
    assert described(directory) == described(tmp_path / "given") != described(base)
    assert (directory / "preprocessor_config.json").is_file()
    assert described(export_live(model, base, tmp_path / "copied")) == described(base)


def test_how_to_generate_is_written_even_where_the_library_refuses_to_save_it(tmp_path: Path) -> None:
    model = llama()
    model.generation_config = GenerationConfig(do_sample=False, temperature=0.5, eos_token_id=[2, 5])
    with pytest.raises(ValueError, match="temperature"):
        model.save_pretrained(tmp_path / "library")
    written = GenerationConfig.from_pretrained(export_live(model, None, tmp_path / "live"))
    assert (written.temperature, written.eos_token_id) == (0.5, [2, 5])
