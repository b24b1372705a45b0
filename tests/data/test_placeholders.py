"""Text that spells the tokens of an image, or other special ones, over the tokenizers that language models have."""

import io
from collections.abc import Callable

import pytest
import torch
from common.models import patch_inputs
from common.tokenizers import KINDS, plain_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from streaming import MDSWriter
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from composer_prior import ComposerLVLM, StreamingCaptionDataset
from composer_prior.data.captions import BadSampleError
from composer_prior.data.tokenizer import add_image_tokens, encode_caption, prompt_ids, tokenizer_fingerprint
from composer_prior.emoji_scenes.writing import make_sample
from composer_prior.models.build import make_lvlm
from composer_prior.models.language import build_language_model
from composer_prior.models.vision import build_patches

CAPTIONS = [make_sample("train", i)["caption"] for i in range(60)]
SPELLED = [f"a {token} b" for token in ("<image>", "<row>")] + ["<image>", "x<image><row>y", "<image> <image>\n<row>"]
SPELLED += [f"a dog {token} b" for token in ("<s>", "</s>", "<eos>", "<pad>", "<|endoftext|>", "<|begin_of_text|>")]


def ordinary(kind: str) -> PreTrainedTokenizerFast:
    """Added, but not special."""
    tokenizer = plain_tokenizer(kind, CAPTIONS)
    tokenizer.add_tokens(["<image>", AddedToken("<row>", normalized=True, lstrip=True)])
    return tokenizer


def learned(kind: str) -> PreTrainedTokenizerFast:
    """Trained on text that is full of them."""
    return plain_tokenizer(kind, [f"<image>{caption}<row><image>" for caption in CAPTIONS] + ["<image>"] * 200, 600)


def saved(kind: str) -> PreTrainedTokenizerFast:
    """Special, and not among those that the configuration names."""
    tokenizer = plain_tokenizer(kind, CAPTIONS)
    tokenizer.add_tokens([AddedToken("<image>", special=True), AddedToken("<row>", special=True)])
    return tokenizer


FORMS: dict[str, Callable[[str], PreTrainedTokenizerFast]] = {
    "plain": lambda kind: plain_tokenizer(kind, CAPTIONS),
    "ordinary": ordinary,
    "learned": learned,
    "saved": saved,
}


# Llama 2's BPE learns "<image>" as a word, where the others part words at "<"; see the bad samples below.
ALL = [(kind, form) for kind in KINDS for form in FORMS]
UNSPELLABLE = [case for case in ALL if case != ("llama2", "learned")]


def word_level() -> PreTrainedTokenizerFast:
    words = {"[UNK]": 0, "<eos>": 1, "<image>": 2, "a": 3, "dog": 4, "say": 5}
    words_only = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    words_only.normalizer = normalizers.Lowercase()
    words_only.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words_only, eos_token="<eos>", unk_token="[UNK]")


def unigram() -> PreTrainedTokenizerFast:
    """User-defined symbols of SentencePiece stand in the vocabulary with the best score that there is."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("<image>", 0.0), ("▁", -2.0), ("a", -3.0), ("▁dog", -4.0)]
    pieces += [(letter, -9.0) for letter in "<>/simgeyorw"]
    scored = Tokenizer(models.Unigram(pieces, unk_id=0))
    scored.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=scored, eos_token="</s>", unk_token="<unk>")


def write(out, captions) -> str:
    data = io.BytesIO()
    Image.new("RGB", (16, 8), "red").save(data, "PNG")
    with MDSWriter(out=str(out), columns={"image": "bytes", "caption": "str"}) as writer:
        for caption in captions:
            writer.write({"image": data.getvalue(), "caption": caption})
    return str(out)


def open_data(folder: str, tokenizer: PreTrainedTokenizerFast, **arguments) -> StreamingCaptionDataset:
    add_image_tokens(tokenizer)
    return StreamingCaptionDataset(
        local=folder,
        tokenizer=tokenizer,
        image_processor=lambda image: patch_inputs(image, 8, 32),
        batch_size=1,
        **arguments,
    )


@pytest.mark.parametrize(("kind", "form"), UNSPELLABLE)
def test_no_caption_spells_a_special_token(kind: str, form: str):
    tokenizer = FORMS[form](kind)
    special = {*add_image_tokens(tokenizer), *tokenizer.all_special_ids}
    fragments = st.sampled_from(
        [*SPELLED, "<", "image", ">", "<im", "age>", "▁", " ", "\n", "é", *special_texts(tokenizer)]
    )

    @settings(max_examples=60, deadline=None)
    @given(st.lists(fragments | st.text(max_size=5), max_size=6).map("".join))
    def holds(caption: str):
        ids = encode_caption(tokenizer, caption).ids
        assert special.isdisjoint(ids)
        if kind != "qwen2":  # which composes characters
            assert tokenizer.decode(ids) == (caption.replace("▁", " ") if kind == "llama2" else caption)

    holds()


def special_texts(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [str(token) for token in tokenizer.added_tokens_decoder.values()]


@pytest.mark.parametrize(("kind", "form"), ALL)
def test_image_tokens_are_added_once(tmp_path, kind: str, form: str):
    tokenizer = FORMS[form](kind)
    others, known = [*tokenizer.all_special_tokens], tokenizer.get_vocab()
    ids = add_image_tokens(tokenizer)
    before = tokenizer_fingerprint(tokenizer)
    assert add_image_tokens(tokenizer) == ids
    assert tokenizer_fingerprint(tokenizer) == before
    assert set(others) <= set(tokenizer.all_special_tokens)
    assert all(tokenizer.added_tokens_decoder[i].special for i in ids)
    assert all(known.get(token, i) == i for token, i in zip(("<image>", "<row>"), ids, strict=True))
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert add_image_tokens(loaded) == ids
    assert encode_caption(loaded, SPELLED[0]).ids == encode_caption(tokenizer, SPELLED[0]).ids


@pytest.mark.parametrize(("kind", "form"), UNSPELLABLE)
def test_a_caption_that_spells_an_image_is_trained_on_as_text(tmp_path, kind: str, form: str):
    tokenizer = FORMS[form](kind)
    data = open_data(write(tmp_path / "data", SPELLED), tokenizer, prompt="Say: ", max_caption_tokens=100)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    language = build_language_model(tokenizer, config={"model_type": "llama", **sizes})
    model = ComposerLVLM(*make_lvlm(language, build_patches(16, patch_size=8, max_side=32), None, tokenizer))
    for index in range(len(SPELLED)):
        item = data[index]
        assert int((item["input_ids"] == model.model.config.image_token_id).sum()) == len(item["pixel_patches"])
        batch = {key: item[key][None] for key in ("input_ids", "labels", "pixel_patches")}
        batch["patch_mask"] = torch.ones(batch["pixel_patches"].shape[:2], dtype=torch.bool)
        assert model(batch)["nll"].isfinite().all()


@pytest.mark.parametrize(
    ("make", "caption"),
    [(word_level, "a <IMAGE> dog"), (unigram, "a dog<image>"), (lambda: learned("llama2"), "a dog x<image>")],
)
def test_a_caption_whose_words_are_the_images_is_a_bad_sample(tmp_path, make, caption: str):
    folder = write(tmp_path / "data", [caption, "a dog"])
    with pytest.raises(BadSampleError, match=r"sample 0 .*: the caption spells <image>, which the tokenizer takes for"):
        open_data(folder, make())[0]
    data = open_data(folder, make(), on_bad_sample="skip")
    assert not (data[0]["labels"] >= 0).any()
    assert (data[1]["labels"] >= 0).any()


@pytest.mark.parametrize(("make", "caption"), [(word_level, "a <eos> dog"), (unigram, "a</s> dog")])
def test_a_caption_does_not_end_in_its_middle(tmp_path, make, caption: str):
    data = open_data(write(tmp_path / "data", [caption]), make())
    with pytest.raises(BadSampleError, match=r"the caption spells <(eos|/s)>"):
        data[0]


def test_unknown_words_are_no_special_ones(tmp_path):
    tokenizer = word_level()
    tokenizer.unk_token = tokenizer.eos_token
    tokenizer.backend_tokenizer.model.unk_token = "<eos>"
    assert len(open_data(write(tmp_path / "data", ["a cat"]), tokenizer)[0]["labels"]) > 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_is_the_same_to_data_model_and_reference(tmp_path, kind: str):
    tokenizer = plain_tokenizer(kind, CAPTIONS)
    folder = write(tmp_path / "data", CAPTIONS[:1])
    prompt = f"{tokenizer.eos_token}Say: "
    before = prompt_ids(tokenizer, prompt)
    data = open_data(folder, tokenizer, prompt=prompt)
    assert data.prompt_ids == before == prompt_ids(tokenizer, prompt)
    assert before[0] == tokenizer.eos_token_id or kind == "llama2"
    encode_caption(tokenizer, "a dog")
    assert prompt_ids(tokenizer, prompt) == before
    for spelled in ("<image>\nSay: ", "Say <row>"):
        with pytest.raises(ValueError, match=r"spells <(image|row)>: the image stands before the prompt"):
            open_data(folder, tokenizer, prompt=spelled)


def test_a_prompt_of_other_letters_that_are_the_images_is_refused():
    tokenizer = word_level()
    add_image_tokens(tokenizer)
    with pytest.raises(ValueError, match="spells <image>"):
        prompt_ids(tokenizer, "say <IMAGE>")


def test_a_model_refuses_the_prompts_that_its_data_refuses():
    tokenizer = plain_tokenizer("smollm2", CAPTIONS)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    add_image_tokens(tokenizer)
    language = build_language_model(tokenizer, config={"model_type": "llama", **sizes})
    model = ComposerLVLM(*make_lvlm(language, build_patches(16, patch_size=8, max_side=32), None, tokenizer))
    with pytest.raises(ValueError, match="spells <image>"):
        model.image_text_model.generate_captions([Image.new("RGB", (8, 8))], prompt="<image> Say: ")
