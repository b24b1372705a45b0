"""Prompts, completions and their labels, with every kind of special tokens."""

import pytest
from common.models import small_lvlm
from common.tokenizers import KINDS, plain_tokenizer
from PIL import Image

from composer_prior import CompletionCollator, beginning, prompt_and_completion
from composer_prior.data.tokenizer import add_image_tokens, bos_id
from composer_prior.models.llava import llava_of
from composer_prior.models.model_folder import for_generation

CAPTIONS = ["a red square", "two green squares and a grey one"]


@pytest.mark.parametrize("form", ["own", "llava"])
@pytest.mark.parametrize("kind", [*KINDS, "no pad"])
def test_labels_are_the_completion_with_its_end(kind, form):
    tokenizer = plain_tokenizer("llama3" if kind == "no pad" else kind, CAPTIONS * 10)
    add_image_tokens(tokenizer)
    model = small_lvlm("encoder", tokenizer).image_text_model
    processor = for_generation(model.processor) if form == "own" else llava_of(model)[1]
    if kind == "no pad":
        processor.tokenizer.pad_token = None
    rows = [
        {"image": Image.new("RGB", (24, 24), "red"), **prompt_and_completion(processor, caption)}
        for caption in CAPTIONS
    ]
    assert "None" not in rows[0]["prompt"]
    assert tokenizer.convert_tokens_to_ids(beginning(tokenizer)) == bos_id(tokenizer)
    batch = CompletionCollator(processor)(rows)
    for row, caption in enumerate(CAPTIONS):
        real = batch["attention_mask"][row].bool()
        learnt = [*tokenizer(caption, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        image = [model.processor.image_token_id] * model.processor.image_processor.max_image_tokens
        assert batch["input_ids"][row][real].tolist() == [bos_id(tokenizer), *image, *learnt]
        labels = batch["labels"][row]
        assert labels[real].tolist() == [-100] * (1 + len(image)) + learnt
        assert (labels[~real] == -100).all()
    assert (batch["labels"] == tokenizer.eos_token_id).sum() == len(rows)
    assert batch["pixel_values"].shape[0] == len(rows)
