"""The tokenizer beside an export has just the tokens that its embedding has rows for, or the export says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer

from shardsmith.cli import main
from shardsmith.diagnose import Questions, diagnose
from shardsmith.errors import UnsupportedFormatError
from shardsmith.hf.vocabulary import last_token
from tests.export.test_live_settings import llama
from tests.hf.test_directory_check import export_live, saved
from tests.hooks.test_export_tokenizers import CHARACTERS, tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")
ROWS = 64  # of the base model
TOKENS = {name: i for i, name in enumerate(CHARACTERS)}
KINDS = {
    "BPE": lambda: models.BPE(vocab=TOKENS, merges=[], unk_token="<unk>"),
    "Unigram": lambda: models.Unigram([(name, -float(i)) for i, name in enumerate(CHARACTERS)], unk_id=0),
    "WordPiece": lambda: models.WordPiece(vocab=TOKENS, unk_token="<unk>"),
    "WordLevel": lambda: models.WordLevel(vocab=TOKENS, unk_token="<unk>"),
}


def with_tokens(count: int) -> Any:
    """A tokenizer with tokens that were added, up to this number in all."""
    grown = tokenizer()
    grown.add_tokens([f"<{i}>" for i in range(count - len(CHARACTERS))])
    assert len(grown) == count
    return grown


@pytest.mark.parametrize("added", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_last_token_is_the_librarys(kind: str, added: int, tmp_path: Path) -> None:
    made = Tokenizer(KINDS[kind]())
    made.add_special_tokens([f"<{i}>" for i in range(added)])
    made.save(str(tmp_path / "tokenizer.json"))
    theirs = made.get_vocab(True)
    token, number = last_token(tmp_path)
    assert number == max(theirs.values())
    assert theirs[token] == number


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"model": {"vocab": 7}}', '{"model": {"vocab": {"a": "b"}}}', "[" * 99999]
)
def test_a_file_that_is_no_tokenizer_is_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(UnsupportedFormatError, match="no tokenizer"):
        last_token(tmp_path)


def said_of(
    base: Path, state: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], *options: str
) -> str:
    """What the command says of the tokenizer; its JSON says the same."""
    where = ["--checkpoint", str(saved(state, tmp_path / "ck")), "--base-model", str(base), *options]
    capsys.readouterr()
    assert main(["to-hf", *where, "--output-dir", str(tmp_path / "out"), "--dtype", "original"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "tokenizer.json" in line and "│" not in line]
    assert main(["to-hf", *where, "--output-dir", str(tmp_path / "json"), "--json"]) == 0
    (directory,) = json.loads(capsys.readouterr().out)["directories"]
    assert ([directory["tokenizer"]] if directory["tokenizer"] else []) == lines
    return "\n".join(lines)


@pytest.mark.parametrize(("tokens", "rows"), [(40, 64), (64, 64), (70, 64), (64, 70), (40, 70), (70, 70), (71, 70)])
def test_a_tokenizer_is_compared_with_the_rows_of_the_embedding(
    tokens: int, rows: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    model, base = llama(), tmp_path / "base"
    model.save_pretrained(base)
    with_tokens(tokens).save_pretrained(base)
    model.resize_token_embeddings(rows)
    grown = ["--allow", "*embed*", "lm_head*"] if rows != ROWS else []
    said = said_of(base, model.state_dict(), tmp_path, capsys, *grown)
    # What the library itself does with the last token of the tokenizer that lies in the export.
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    last = max(AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab().values())
    assert last == tokens - 1
    if tokens > rows:
        with pytest.raises(IndexError):
            loaded(torch.tensor([[last]]))
        assert f"tokenizer.json has the id {last}, of '<{last - len(CHARACTERS)}>', and " in said
        assert f"embed_tokens.weight has {rows} rows" in said
    else:
        loaded(torch.tensor([[last]]))
        lost = rows > ROWS and tokens <= ROWS
        assert ("has grown by the rows 64 to 69" in said) is lost
        assert lost or not said
    # The live export says the same, and says it loudly.
    export_live(model, base, tmp_path / "live")
    loud = [one.message for one in caplog.records if one.levelname == "WARNING" and "tokenizer.json" in one.message]
    assert loud == ([f"{tmp_path / 'live' / 'step-1'}: {said}"] if said else [])


def test_the_tokenizer_of_the_run_goes_before_that_of_the_base(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, base = llama(), tmp_path / "base"
    model.save_pretrained(base)
    tokenizer().save_pretrained(base)
    model.resize_token_embeddings(70)
    for count, is_right in ((70, True), (72, False)):
        caplog.clear()
        export_live(model, base, tmp_path / f"live-{count}", processor=with_tokens(count))
        assert ("tokenizer.json has the id" not in caplog.text) is is_right
        assert "has grown" not in caplog.text


@pytest.mark.parametrize("has_weights", [True, False])
@pytest.mark.parametrize("tokens", [64, 65])
def test_diagnose_looks_at_the_tokenizer_of_the_model_itself(tokens: int, has_weights: bool, tmp_path: Path) -> None:
    model, base = llama(), tmp_path / "base"
    model.save_pretrained(base)
    with_tokens(tokens).save_pretrained(base)
    if not has_weights:
        (base / "model.safetensors").unlink()
    checkpoint = saved(model.state_dict(), tmp_path / "ck")
    found = diagnose(checkpoint, base, Questions(level="model"))
    codes = [finding.code for finding in found.faults]
    assert codes == (["tokenizer-too-large"] if tokens > ROWS else [])
