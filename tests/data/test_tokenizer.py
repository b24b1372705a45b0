"""The tokenizer that is trained on captions."""

import json

import pytest
from common.chats import TEMPLATES
from common.vlms import make_processor
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from composer_prior.data.tokenizer import build_tokenizer, tokenizer_fingerprint, train_tokenizer
from composer_prior.emoji_scenes.writing import make_sample


def test_any_text_comes_back(tokenizer):
    @given(st.text(max_size=50))
    def round_trip(text):
        assert tokenizer.decode(tokenizer(text, split_special_tokens=True)["input_ids"]) == text

    round_trip()


def test_training_is_deterministic():
    captions = [make_sample("train", i)["caption"] for i in range(100)]
    first, second = (train_tokenizer(captions, 500) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()
    assert len(first) == 500
    assert tokenizer_fingerprint(first) == tokenizer_fingerprint(second)


def test_the_fingerprint_survives_saving_and_tells_tokenizers_apart(tmp_path, tokenizer):
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["some", "text that is padded"], padding=True, truncation=True, max_length=3)
    assert tokenizer_fingerprint(tokenizer) == before
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer_fingerprint(loaded) == before
    loaded.add_tokens(["new"])
    assert tokenizer_fingerprint(loaded) != before


def test_special_tokens(tokenizer):
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3, 4]) == ["<pad>", "<bos>", "<eos>", "<image>", "<row>"]


def test_the_own_template_may_be_the_processors(tmp_path):
    """Processors of before have it in a file of theirs."""
    processor = make_processor("llava")
    processor.tokenizer.chat_template = processor.chat_template = None
    processor.save_pretrained(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATES["vicuna"]}))
    tokenizer = build_tokenizer({"name": str(tmp_path), "image_tokens": False, "chat_template": "own"})
    assert tokenizer.chat_template.endswith(TEMPLATES["vicuna"])


def test_a_template_is_refused_where_no_token_of_an_image_is_known(tmp_path, monkeypatch):
    make_processor("llava").save_pretrained(tmp_path)
    monkeypatch.setattr("composer_prior.data.tokenizer._PLACEHOLDERS", ())
    named = {"name": str(tmp_path), "image_tokens": False, "chat_template": TEMPLATES["vicuna"]}
    with pytest.raises(ValueError, match=r"tokenizer.chat_template: it is not known how a .* names images"):
        build_tokenizer(named)
    assert build_tokenizer({**named, "chat_template": None}).chat_template is None
