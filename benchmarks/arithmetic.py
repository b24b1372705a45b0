"""Memory of a model on each GPU, by arithmetic: ``python -m benchmarks.arithmetic [samples=8] [text=256]``.

OpenCLIP's ViT-L-14-336 and a Llama of 8 billion weights (the shapes of Llama 3) are built on the meta device. The
benchmark counts their weights and the tensors that autograd saves in a block, with attention that saves what flash
attention saves. Master weights, gradients and AdamW's moments are in float32 and sharded over the ranks; gathered
weights and activations are in bfloat16. At most the root, a block, the next block, and the gradients of root and block
are gathered at a time. Logits, buffers of NCCL and fragmentation are not counted.
"""

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.measure import prepare_process
from benchmarks.setup import build_tokenizer
from composer_prior.models.build import lvlm_skeleton
from composer_prior.models.language import transformer_blocks

LLAMA_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
TOWER = {"name": "open_clip", "architecture": "ViT-L-14-336-quickgelu", "freeze": True}
RANKS = (8, 16, 64)
GB = 1e9


def weights(*modules: nn.Module) -> int:
    """Count the weights of modules, each once."""
    return sum({id(p): p.numel() for module in modules for p in module.parameters()}.values())


class _FlashAttention(torch.autograd.Function):
    """Saves what flash attention saves, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # type: ignore[override]
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
    return _FlashAttention.apply(query, key, value).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register("counted", _attention)


def saved_bytes(layer: nn.Module, hidden: Tensor, **inputs: Any) -> int:
    """Return the bytes that autograd saves in a forward pass of a block, without its weights."""
    saved: dict[int, Tensor] = {}
    own = {id(parameter) for parameter in layer.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if id(tensor) not in own and id(tensor._base) not in own:
            base = tensor if tensor._base is None else tensor._base
            saved[id(base)] = base
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(hidden, **inputs)
    return sum(tensor.numel() * tensor.element_size() for tensor in saved.values())


def activations(model: Any, samples: int, tokens: int) -> tuple[float, float]:
    """Return the bytes of activations of a microbatch in the language model, without and with checkpointing."""
    language = model.model.causal_lm.model
    language.config._attn_implementation = "counted"
    block = language.layers[0].to(torch.bfloat16).train()
    hidden = torch.empty(samples, tokens, language.config.hidden_size, dtype=torch.bfloat16, device="meta")
    rotations = torch.empty(1, tokens, block.self_attn.head_dim, dtype=torch.bfloat16, device="meta")
    of_block = saved_bytes(block, hidden.requires_grad_(), position_embeddings=(rotations, rotations))
    inputs = len(language.layers) * hidden.numel() * 2
    return len(language.layers) * of_block, inputs + of_block


class Parts(NamedTuple):
    """Numbers of weights of an LVLM by their use."""

    every: int
    trained: int
    root: int  # outside of the blocks, always gathered
    largest: int  # of the blocks

    @property
    def states(self) -> int:
        """Bytes of weights, gradients and moments, in float32, over all ranks."""
        return 4 * self.every + 12 * self.trained

    @property
    def gathered(self) -> int:
        """Bytes that FSDP2 by block gathers on each rank: root, two blocks, gradients of root and one block."""
        return 2 * (self.root + 2 * self.largest) + 2 * (self.root + self.largest)


def build(language: Mapping[str, Any]) -> Any:
    """Build an LVLM with this language model and a frozen ViT-L-14-336 on the meta device."""
    projector = {"name": "mlp"}
    return lvlm_skeleton(build_tokenizer(), language={"config": dict(language)}, vision=TOWER, projector=projector)


def parts_of(model: Any) -> Parts:
    """Count the weights of a model."""
    blocks = transformer_blocks(model.model)
    every = weights(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Parts(every, trained, every - weights(*blocks), max(weights(block) for block in blocks))


def main() -> None:
    """Print a table."""
    settings = OmegaConf.merge({"samples": 8, "text": 256}, OmegaConf.from_dotlist(sys.argv[1:]))
    prepare_process(1)
    model = build(LLAMA_8B)
    parts = parts_of(model)
    tokens = 1 + model.processor.image_processor.max_image_tokens + settings.text
    kept, checkpointed = activations(model, settings.samples, tokens)
    blocks = len(transformer_blocks(model.model))
    print(
        f"{parts.every / GB:.2f} billion weights, {parts.trained / GB:.2f} trained; {blocks} blocks of at most "
        f"{parts.largest / 1e6:.0f} million, {parts.root / GB:.2f} billion outside of them; in float32 "
        f"{4 * parts.every / GB:.1f} GB.\n"
        f"Activations of {settings.samples} samples of {tokens} tokens in the language model: {kept / GB:.1f} GB, with "
        f"checkpointing {checkpointed / GB:.1f} GB.\n"
    )
    units = {"one unit": 2 * parts.every + 2 * parts.trained, "by block": parts.gathered}
    print("| GB a GPU, without activations | weights, gradients, moments | gathered | together |")
    print("| --- | ---: | ---: | ---: |")
    for ranks in RANKS:
        for name, gathered in units.items():
            states = parts.states / ranks
            cells = (f"{value / GB:.1f}" for value in (states, gathered, states + gathered))
            print(f"| {ranks} GPUs, {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
