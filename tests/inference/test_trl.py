"""TRL's SFTTrainer on the model in Hugging Face format and on its LLaVA export: the ids it trains on, and its loss."""

import pytest
import torch
from common.models import small_lvlm
from common.tokenizers import KINDS, plain_tokenizer
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

from composer_prior import load
from composer_prior.data.tokenizer import add_image_tokens, bos_id, image_token_ids, prompt_ids
from composer_prior.models.llava import export_llava

pytestmark = pytest.mark.slow

PROMPT = "a photo of"
CAPTIONS = [f"{color} squares, photo {number}" for number, color in enumerate(("red", "green", "blue", "grey"))]


def samples(before=""):
    """Four pictures; ``before`` stands before the image, where the processor does not put the beginning itself."""
    for number, caption in enumerate(CAPTIONS):
        image = Image.new("RGB", (24 + 8 * number, 24 + 8 * number), caption.split()[0])
        content = [{"type": "text", "text": before}, {"type": "image"}, {"type": "text", "text": PROMPT}]
        yield {
            "images": [image],
            "prompt": [{"role": "user", "content": content}],
            "completion": [{"role": "assistant", "content": [{"type": "text", "text": " " + caption}]}],
        }


@pytest.mark.parametrize("form_name", ["encoder", "patches", "llava"])
@pytest.mark.parametrize("kind", KINDS)
def test_three_steps(kind, form_name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = plain_tokenizer(kind, [*CAPTIONS, PROMPT] * 10)
    add_image_tokens(tokenizer)
    lvlm = small_lvlm("encoder" if form_name == "llava" else form_name, tokenizer).eval()
    if form_name == "llava":
        export_llava(lvlm.image_text_model, "model")
    else:
        lvlm.image_text_model.save_pretrained("model")
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
    # TRL asks a tokenizer for no special tokens; a stock processor then leaves the beginning to the text.
    data = [*samples((tokenizer.bos_token or tokenizer.eos_token) if form_name == "llava" else "")]
    trainer = SFTTrainer(form, options, train_dataset=Dataset.from_list(data), processing_class=processor)
    first = data[:2]
    batch = trainer.data_collator(first)
    for row, sample in enumerate(first):
        image = lvlm.image_processor(sample["images"][0])
        cells = [image_token_ids(tokenizer)[kind] for kind in image.layout]
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
    if form_name == "llava":
        return
    trainer.save_model("tuned")
    tuned = load("tuned")
    weights, before = tuned.model.state_dict(), lvlm.model.state_dict()
    assert weights.keys() == before.keys()
    assert any(not torch.equal(weights[name], tensor) for name, tensor in before.items())
    assert len(tuned.generate_captions(first[0]["images"], max_new_tokens=4)) == 1
