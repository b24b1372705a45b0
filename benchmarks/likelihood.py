"""Compare caption likelihoods with a plain loop: ``python -m benchmarks.likelihood [rounds=5] [images=16] …``.

Both sides have the same weights, as a LLaVA of transformers and as our model, and the same prepared images. One forward
pass of the LLaVA per caption, with logits of every position, takes turns with the code of ``composer-prior evaluate``.
The log-probabilities are compared.
"""

import os
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from benchmarks.measure import interleaved, prepare_process, ratio
from benchmarks.setup import FIRST_WORD, IMAGE_TOKENS, VOCABULARY, build_llava, build_ours, caption_lengths
from composer_prior.models.image_text_model import ImageTextModel

DEFAULTS = {"rounds": 5, "images": 16, "threads": os.cpu_count(), "median": 12}


class Prepared(ImageTextModel):
    """A model whose images are pixels ``[3, H, W]``, prepared already."""

    def inputs(self, images: Sequence[Any], prompt: str | None = None) -> dict[str, Tensor]:
        """Return the beginning of sequence and the image, once for each image."""
        ids = torch.tensor([[1] + [self.model.config.image_token_id] * IMAGE_TOKENS] * len(images))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.stack([*images])}


def main(arguments: list[str]) -> None:
    """Print a Markdown table."""
    given = OmegaConf.merge(DEFAULTS, OmegaConf.from_dotlist(arguments))
    prepare_process(given.threads)
    ours = build_ours().eval()
    theirs = build_llava(ours).eval()
    model = Prepared(ours.model, ours.processor)
    generator = torch.Generator().manual_seed(19)
    print("| captions of an image | usual loop, captions/s | ours, captions/s | ours / loop |")
    print("| --- | --- | --- | --- |")
    for count in (1, 2, 5):
        pixels = torch.randn(given.images, 3, 96, 96, generator=generator)
        lengths = caption_lengths(given.images * count, float(torch.tensor(given.median).log()), 0.4, 100)
        ids = [torch.randint(FIRST_WORD, VOCABULARY, (n,), generator=generator).tolist() for n in lengths.tolist()]
        texts = [ids[start : start + count] for start in range(0, len(ids), count)]

        def usual(pixels=pixels, texts=texts) -> list[float]:  # type: ignore[no-untyped-def]
            found = []
            with torch.no_grad():
                for image, some in zip(pixels, texts, strict=True):
                    for text in some:
                        row = torch.tensor([[1] + [model.model.config.image_token_id] * IMAGE_TOKENS + text])
                        logits = theirs(
                            input_ids=row, pixel_values=image[None], attention_mask=torch.ones_like(row)
                        ).logits
                        scores = logits[0, IMAGE_TOKENS:-1].float().log_softmax(-1)
                        found.append(float(scores.gather(1, torch.tensor(text)[:, None]).sum()))
            return found

        def own(pixels=pixels, texts=texts) -> list[float]:  # type: ignore[no-untyped-def]
            return [sum(values) for some in model.text_logprobs([*pixels], texts) for values in some]

        assert torch.allclose(torch.tensor(usual()), torch.tensor(own()), rtol=1e-5)
        seconds = interleaved({"usual": usual, "own": own}, given.rounds)
        rates = [len(ids) / statistics.median(seconds[name]) for name in ("usual", "own")]
        print(
            f"| {count} | {rates[0]:.1f} | {rates[1]:.1f} | {ratio(seconds['usual'], seconds['own']):.2f} |", flush=True
        )


if __name__ == "__main__":
    main(sys.argv[1:])
