from __future__ import annotations

from pathlib import Path

import pytest
from transformers import Qwen2Config

from shardsmith.compare.class_ties import tied_in_class


@pytest.mark.parametrize("relative", [False, True])
def test_another_base_may_lie_at_the_same_path(relative: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for tied in (True, False):
        place = tmp_path / ("" if not relative else str(tied)) / "base"
        sizes = {"vocab_size": 11, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
        config = Qwen2Config(**sizes, **heads, tie_word_embeddings=tied, architectures=["Qwen2ForCausalLM"])
        config.save_pretrained(place)
        monkeypatch.chdir(place.parent)
        found.append(bool(tied_in_class(Path("base") if relative else place)))
    assert found == [True, False]
