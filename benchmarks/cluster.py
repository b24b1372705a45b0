"""Memory and time by number of nodes, by arithmetic: ``python -m benchmarks.cluster [mfu=0.4] [caption=40] ...``.

Llamas of 1, 8 and 70 billion weights (the shapes of Llama 3) behind a frozen ViT-L-14-336, on nodes of 8 GPUs, FSDP2 by
block with activation checkpointing. Memory is counted as by :mod:`benchmarks.arithmetic`, with its microbatch of 8
samples and captions of 256 tokens. Time is the operations of captions of 40 tokens, forward and backward, without
recomputation, at an assumed share (``mfu``) of an assumed peak (``tflops``, of an H100 in bf16). A checkpoint holds the
weights and AdamW's two moments of trained weights in float32, written at an assumed rate (``write``, GB/s a node).
"""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from omegaconf import OmegaConf

from benchmarks.arithmetic import GB, LLAMA_8B, activations, build, parts_of
from benchmarks.flops import head_forward, image_forward, lm_forward
from benchmarks.measure import prepare_process

LLAMAS = {
    "1B": {
        **LLAMA_8B,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "tie_word_embeddings": True,
    },
    "8B": LLAMA_8B,
    "70B": {
        **LLAMA_8B,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}
DEFAULTS = {"samples": 8, "text": 256, "caption": 40, "mfu": 0.4, "tflops": 989, "write": 2, "gpu_gb": 80}
NODES, GPUS = (1, 2, 4, 8, 16), 8
MEMORY = ("model", "nodes", "weights, gradients, moments", "gathered", "activations", "together")
TIME = ("model", "nodes", "minutes for a million captions", "checkpoint, GB", "s to write it")


def operations(model: Any, caption: int) -> float:
    """Count the operations of training on one captioned image; the frozen tower has no backward pass."""
    lvlm = model.model
    tokens = torch.tensor([1 + lvlm.config.vision["image_tokens"] + caption])
    side = lvlm.model.vision_tower.image_size
    tower, projector = image_forward(lvlm, {"pixel_values": torch.zeros(1, 3, side, side, device="meta")})
    trained = projector + lm_forward(lvlm.causal_lm, tokens) + head_forward(lvlm.causal_lm, caption)
    return tower + 3 * trained


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    yield f"| {' | '.join(head)} |"
    yield f"| --- |{' ---: |' * (len(head) - 1)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Print two tables."""
    settings = OmegaConf.merge(DEFAULTS, OmegaConf.from_dotlist(sys.argv[1:]))
    prepare_process(1)
    memory, time = [], []
    for name, language in LLAMAS.items():
        model = build(language)
        parts, work = parts_of(model), operations(model, settings.caption)
        tokens = 1 + model.processor.image_processor.max_image_tokens + settings.text
        _, kept = activations(model, settings.samples, tokens)
        checkpoint = (4 * parts.every + 8 * parts.trained) / GB
        for nodes in NODES:
            gpus = nodes * GPUS
            taken = (parts.states / gpus / GB, parts.gathered / GB, kept / GB)
            together = f"{sum(taken):.1f}" if sum(taken) <= settings.gpu_gb else f"{sum(taken):.1f}, too much"
            memory.append((name, str(nodes), *(f"{value:.1f}" for value in taken), together))
            if sum(taken) <= settings.gpu_gb:
                minutes = 1e6 * work / (gpus * settings.tflops * 1e12 * settings.mfu) / 60
                written = checkpoint / (nodes * settings.write)
                time.append((name, str(nodes), f"{minutes:.1f}", f"{checkpoint:.0f}", f"{written:.0f}"))
    print(*table(MEMORY, memory), "", *table(TIME, time), sep="\n")


if __name__ == "__main__":
    main()
