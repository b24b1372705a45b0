"""The tokenizer that is trained on captions."""

from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from composer_prior.data.tokenizer import tokenizer_fingerprint, train_tokenizer
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
