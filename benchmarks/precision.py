"""Compare scoring in three types: ``python -m benchmarks.precision REFERENCE DATA [samples=1024]``.

A reference scores the captions of an MDS data set in float32, bfloat16 and float16, on a GPU if there is one. The table
shows its size, its speed, and the difference of the weights ``1 - P`` of the tokens from those in float32.
"""

import sys
import time
from typing import Any, get_args

import numpy as np
import torch
from composer.utils import get_device
from omegaconf import OmegaConf

from benchmarks.measure import prepare_process
from composer_prior.data.captions import StreamingCaptionDataset
from composer_prior.data.mds import read_column
from composer_prior.data.tokenizer import build_tokenizer
from composer_prior.models.reference import Dtype, ReferenceLM
from composer_prior.scoring.score import score_texts


def main() -> None:
    """Print a table."""
    folder, local = sys.argv[1:3]
    settings = OmegaConf.merge({"samples": 1024}, OmegaConf.from_dotlist(sys.argv[3:]))
    prepare_process(torch.get_num_threads())
    device: Any = get_device(None)._device
    data = StreamingCaptionDataset(local=local, tokenizer=build_tokenizer({"name": folder}), batch_size=1)
    captions = list(read_column(data, "caption", range(min(settings.samples, data.num_samples))))
    print(
        "| dtype | MB of weights | tokens/s | weights differ by (mean) | (largest) |\n| --- | --- | --- | --- | --- |"
    )
    exact = None
    for dtype in get_args(Dtype):
        reference = ReferenceLM.from_pretrained(folder, dtype=dtype).to(device)
        score_texts(captions[:64], data.format, reference)  # warms up
        start = time.perf_counter()
        logprobs = np.concatenate(score_texts(captions, data.format, reference))
        seconds = time.perf_counter() - start
        weights = -np.expm1(logprobs.astype(np.float64))
        exact = weights if exact is None else exact
        differences = np.abs(weights - exact)
        size = sum(p.numel() * p.element_size() for p in reference.model.parameters()) / 1e6
        cells = [dtype, f"{size:,.1f}", f"{len(weights) / seconds:,.0f}"]
        print("| " + " | ".join([*cells, f"{differences.mean():.1e}", f"{differences.max():.1e}"]) + " |", flush=True)


if __name__ == "__main__":
    main()
