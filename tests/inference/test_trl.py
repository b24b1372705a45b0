"""TRL's SFTTrainer on the model's own Hugging Face form: the ids it trains on, and its loss."""

import pytest
import torch
from common.models import small_lvlm
from common.tokenizers import KINDS, plain_tokenizer
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

from composer_prior import load
from composer_prior.data.tokenizer import add_image_tokens, bos_id, prompt_ids

PROMPT = "a photo of"
CAPTIONS = [f"{color} squares, photo {number}" for number, color in enumerate(("red", "green", "blue", "grey"))]


def samples():
    for number, caption in enumerate(CAPTIONS):
        image = Image.new("RGB", (24 + 8 * number, 24), caption.split()[0])
        content = [{"type": "image"}, {"type": "text", "text": PROMPT}]
        yield {
            "images": [image],
            "prompt": [{"role": "user", "content": content}],
            "completion": [{"role": "assistant", "content": [{"type": "text", "text": " " + caption}]}],
        }


@pytest.mark.parametrize("family", ["encoder", "patches"])
@pytest.mark.parametrize("kind", KINDS)
def test_three_steps(kind, family, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = plain_tokenizer(kind, [*CAPTIONS, PROMPT] * 10)
    add_image_tokens(tokenizer)
    lvlm = small_lvlm(family, tokenizer).model.eval()
    lvlm.save_pretrained("model")
    form = AutoModelForImageTextToText.from_pretrained("model")
    processor = AutoProcessor.from_pretrained("model")
    options = SFTConfig(
        "out",
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        max_length=None,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = SFTTrainer(form, options, train_dataset=Dataset.from_list([*samples()]), processing_class=processor)
    first = [*samples()][:2]
    batch = trainer.data_collator(first)
    for row, sample in enumerate(first):
        image = lvlm.image_processor(sample["images"][0])
        cells = [(lvlm.image_token_id, lvlm.row_token_id)[kind] for kind in image.layout]
        caption = tokenizer(" " + CAPTIONS[row], add_special_tokens=False)["input_ids"]
        ids = [bos_id(tokenizer), *cells, *prompt_ids(tokenizer, PROMPT), *caption, tokenizer.eos_token_id]
        real = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][real].tolist() == ids
        labels = batch["labels"][row][real]
        assert labels[labels != -100].tolist() == ids[-len(caption) - 1 :]
    with torch.no_grad():
        nll = lvlm(batch)["nll"]
    count = (batch["labels"] != -100).sum()
    assert float(form.eval()(**batch).loss) == pytest.approx(float(nll.sum() / count), abs=1e-5)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert all(0 < loss < 20 for loss in losses)
    trainer.save_model("tuned")
    tuned = load("tuned")
    assert any(not torch.equal(tuned.state_dict()[name], tensor) for name, tensor in lvlm.state_dict().items())
    assert len(tuned.generate(first[0]["images"], max_new_tokens=4)) == 1
