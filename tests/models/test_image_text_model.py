"""Likelihoods of texts beside images against plain forward passes, one text at a time with full logits."""

import numpy as np
import pytest
import torch
from common.models import FAMILIES, FRONT_ENDS, small_lm, small_lvlm
from common.vlms import KINDS, make_processor, make_vlm
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM

from composer_prior.data.captions import CaptionFormat
from composer_prior.data.messages import DataError
from composer_prior.evaluation.choices import TextOnly
from composer_prior.models.image_text_model import ImageTextModel, continuation_logprobs
from composer_prior.models.language import head_of
from composer_prior.models.prior_lvlm.modeling_prior_lvlm import decoder_of
from composer_prior.models.reference import ReferenceLM

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 100, "pad_token_id": 0, "initializer_range": 0.3}
LANGUAGES = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "gemma2": {"sliding_window": 8, "head_dim": 8, "num_hidden_layers": 4},
    "cohere": {"logit_scale": 0.3},
    "gpt2": {},
    "mamba": {},
}


def pictures():
    random = np.random.default_rng(7)
    small = [random.integers(0, 255, (5, 7, 3), dtype=np.uint8) for _ in range(3)]
    sizes = [(40, 30), (23, 61), (40, 30)]
    return [Image.fromarray(s).resize(size, Image.Resampling.BICUBIC) for s, size in zip(small, sizes, strict=True)]


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("batch_tokens", [None, 30])
def test_texts_behind_beginnings_are_scored_as_if_alone(language, batch_tokens):
    torch.manual_seed(0)
    config = AutoConfig.for_model(language, **{**SIZES, **LANGUAGES[language]})
    model = AutoModelForCausalLM.from_config(config).eval()
    beginnings = torch.randint(3, 100, (3, 12))
    texts = [[[5, 6, 7], [9]], [[8] * 14], []]
    prefix = {
        "inputs_embeds": model.get_input_embeddings()(beginnings),
        "attention_mask": torch.ones_like(beginnings),
    }
    found = continuation_logprobs(decoder_of(model), head_of(model), prefix, texts, batch_tokens)
    assert [[len(scores) for scores in some] for some in found] == [[3, 1], [14], []]
    for beginning, some, scores in zip(beginnings, texts, found, strict=True):
        for text, values in zip(some, scores, strict=True):
            ids = torch.tensor(text)
            with torch.no_grad():
                logits = model(torch.cat([beginning, ids])[None]).logits[0, 11:-1]
            expected = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
            assert torch.tensor(values) == pytest.approx(expected, abs=1e-5)


TEXTS = [["w4 w9w12", "w5"], ["w33 w33w33w33w8w7w6"], ["w59w58", "w4", "w20w21w22w23"]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", [None, "w7w8"])
@pytest.mark.parametrize("end", [True, False])
def test_models_of_transformers(kind, prompt, end):
    model, processor = make_vlm(kind).eval(), make_processor(kind)
    token = {"llava": "<image>", "qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>", "idefics3": "<image>"}[kind]
    if kind == "qwen2_vl":
        processor.chat_template = (
            "{% for part in messages[0]['content'] %}{% if part['type'] == 'image' %}" + token + "{% else %}"
            "{{ part['text'] }}{% endif %}{% endfor %}"
        )
    found = ImageTextModel(model.eval(), processor).logprobs(pictures(), TEXTS, prompt, end)
    for image, texts, scores in zip(pictures(), TEXTS, found, strict=True):
        for text, score in zip(texts, scores, strict=True):
            ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += [processor.tokenizer.eos_token_id] * end
            inputs = processor(images=[image], text=[token + (prompt or "")], return_tensors="pt")
            inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([ids])], 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            if "mm_token_type_ids" in inputs:  # Qwen2-VL's, in transformers 5
                inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, len(ids)))
            with torch.no_grad():
                logits = model(**inputs).logits[0, -len(ids) - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
            assert torch.tensor(score.values) == pytest.approx(expected, abs=1e-5)
            assert len(score.offsets) == len(ids)
            assert score.offsets[-1] == ((len(text),) * 2 if end else (text.rindex("w"), len(text)))


@pytest.mark.parametrize("family", [*FAMILIES, *FRONT_ENDS])
def test_a_model_in_training_and_its_folder(family, tokenizer, tmp_path):
    trained = small_lvlm(family, tokenizer).eval()
    trained.processor.prompt = "a picture of"
    own = trained.image_text_model
    own.save_pretrained(tmp_path / "model")
    form = ImageTextModel.from_pretrained(tmp_path / "model")
    texts = [["a red snail", "two owls"], ["a photo"], []]
    for prompt in (None, "", "buy"):
        ours = own.logprobs(pictures(), texts, prompt)
        theirs = form.logprobs(pictures(), texts, prompt)
        for some, same, image, written in zip(ours, theirs, pictures(), texts, strict=True):
            for one, other, text in zip(some, same, written, strict=True):
                assert one.offsets == other.offsets
                assert one.values == pytest.approx(other.values, abs=1e-5)
                assert one.values == pytest.approx(of_training(trained, image, text, prompt), abs=1e-5)
    assert own.generate_captions(pictures()) == form.generate_captions(pictures())


def of_training(model, image, text, prompt):
    """The log-probabilities that the loss of training is made of."""
    batch = model.image_text_model.inputs([image], prompt)
    ids = [*model.tokenizer(text, add_special_tokens=False)["input_ids"], model.tokenizer.eos_token_id]
    start = batch["input_ids"].shape[1]
    batch["input_ids"] = torch.cat([batch["input_ids"], torch.tensor([ids])], 1)
    batch["labels"] = torch.where(torch.arange(batch["input_ids"].shape[1]) < start, -100, batch["input_ids"])
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    with torch.no_grad():
        return (-model(batch)["nll"][0, start:]).tolist()


def test_text_alone_is_scored_as_the_reference_scores_it(tokenizer):
    reference = ReferenceLM(small_lm(tokenizer), tokenizer)
    (scores,) = TextOnly(reference).logprobs([None], [["a red snail", "two owls"]], "buy")
    layout = CaptionFormat(tokenizer, "buy")
    for text, score in zip(("a red snail", "two owls"), scores, strict=True):
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        (expected,) = reference.score_texts([[*layout.prefix_ids(), *ids]], len(layout.prefix_ids()))
        assert score.values == pytest.approx(expected.tolist(), abs=1e-6)


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(DataError, match=f"{tmp_path} holds no model: it has no config.json"):
        ImageTextModel.from_pretrained(tmp_path)
