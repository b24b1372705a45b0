"""PRIOR in a plain PyTorch loop: a model of transformers learns captions, weighted by a text-only reference.

    python examples/plain_pytorch.py runs/prior_vit/model runs/reference/model    # after make train

The models share a tokenizer, whose special tokens mark the beginning and end of a caption.
"""

import io
import sys

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from composer_prior import importance_weights
from composer_prior.emoji_scenes.writing import make_sample  # in place of your pairs of images and captions


def token_logprobs(logits: torch.Tensor, ids: torch.Tensor, length: int) -> torch.Tensor:
    """Return log-probabilities ``[B, length]`` of the last tokens of ``ids [B, T]``, given ``logits [B, T, V]``."""
    return -F.cross_entropy(logits[:, -length - 1 : -1].transpose(1, 2), ids[:, -length:], reduction="none")


def main(model_path: str, reference_path: str, steps: int = 20, batch_size: int = 8) -> list[float]:
    """Train for some steps; return the losses of the steps, without weights."""
    torch.manual_seed(17)
    processor = AutoProcessor.from_pretrained(model_path, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(model_path, trust_remote_code=True).train()
    reference = AutoModelForCausalLM.from_pretrained(reference_path).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokenizer, losses = processor.tokenizer, []
    tokenizer.padding_side = "left"  # so that captions are the last tokens, whatever stands before them

    for step in range(steps):
        samples = [make_sample("train", step * batch_size + row) for row in range(batch_size)]
        images = [[Image.open(io.BytesIO(sample["image"])).convert("RGB")] for sample in samples]
        captions = [sample["caption"] + tokenizer.eos_token for sample in samples]
        texts = ["<image>" + caption for caption in captions]
        batch = processor(images=images, text=texts, padding=True, return_tensors="pt")

        # The reference reads the captions alone.
        options = {"add_special_tokens": False, "padding": True, "return_tensors": "pt"}
        text = tokenizer([tokenizer.bos_token + caption for caption in captions], **options)
        mask = text["attention_mask"][:, :-1].bool()  # of the tokens behind the first, which begins the sequence
        length = mask.shape[1]
        with torch.no_grad():
            logits = reference(input_ids=text["input_ids"], attention_mask=text["attention_mask"]).logits
            ref_logprobs = token_logprobs(logits, text["input_ids"], length)
        weights = importance_weights(ref_logprobs, mask, floor=0.1)

        nll = -token_logprobs(model(**batch).logits, batch["input_ids"], length)
        (nll * weights).sum().div(mask.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(nll[mask].mean()))
        print(f"step {step}: loss {losses[-1]:.4f}, weights up to {weights.max():.2f}")
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:3])
