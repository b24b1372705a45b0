"""An OpenCLIP encoder as a vision model of transformers: plain ViTs of CLIP, and timm's of SigLIP."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from timm.models.vision_transformer import Block
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn
from transformers import CLIPVisionConfig, PretrainedConfig, SiglipVisionConfig
from transformers.activations import ACT2FN

ACTIVATIONS = ("gelu", "quick_gelu", "gelu_pytorch_tanh")
CLIP_NAMES = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",
    "ln_pre.bias": "pre_layrnorm.bias",
}
CLIP_BLOCK = {
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
SIGLIP_NAMES = {
    "trunk.pos_embed": "embeddings.position_embedding.weight",
    "trunk.patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "trunk.patch_embed.proj.bias": "embeddings.patch_embedding.bias",
}
SIGLIP_BLOCK = {
    "norm1": "layer_norm1",
    "attn.proj": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


class NoStockModelError(ValueError):
    """Why an encoder is no vision model of transformers."""


class StockVision(NamedTuple):
    """A vision model of transformers."""

    config: PretrainedConfig  # with as many blocks as the encoder has left: the last one gives the features
    weights: dict[str, Tensor]  # by their names in the model's transformer
    class_tokens: int  # how many tokens stand before those of the patches


def stock_vision(encoder: nn.Module, image_size: int) -> StockVision:
    """Build the vision model of transformers that equals an encoder of OpenCLIP up to its last block."""
    trunk = getattr(encoder, "trunk", encoder)
    if type(encoder) is VisionTransformer:
        return _clip(encoder, image_size)
    if type(encoder) is TimmModel and type(trunk) is TimmVisionTransformer:
        return _siglip(encoder, image_size)
    raise NoStockModelError(f"its {type(trunk).__name__} is no plain ViT of CLIP or SigLIP")


def _clip(encoder: VisionTransformer, image_size: int) -> StockVision:
    blocks: Any = encoder.transformer.resblocks
    _expect(blocks, ResidualAttentionBlock)
    names = _all_names(CLIP_NAMES, "transformer.resblocks", CLIP_BLOCK, "attn.in_proj_", len(blocks))
    weights = _renamed(encoder.state_dict(), names)
    config = CLIPVisionConfig(
        hidden_size=encoder.conv1.out_channels,
        intermediate_size=blocks[0].mlp.c_fc.out_features,
        num_hidden_layers=len(blocks),
        num_attention_heads=blocks[0].attn.num_heads,
        image_size=image_size,
        patch_size=encoder.patch_size[0],
        hidden_act=_activation(block.mlp.gelu for block in blocks),
        layer_norm_eps=_epsilon([encoder.ln_pre, *blocks.modules()]),
    )
    return StockVision(config, weights, class_tokens=1)


def _siglip(encoder: TimmModel, image_size: int) -> StockVision:
    trunk: Any = encoder.trunk
    blocks = trunk.blocks
    _expect(blocks, Block)
    names = _all_names(SIGLIP_NAMES, "trunk.blocks", SIGLIP_BLOCK, "attn.qkv.", len(blocks))
    weights = _renamed(encoder.state_dict(), names)
    position = "embeddings.position_embedding.weight"
    weights[position] = weights[position][0]
    config = SiglipVisionConfig(
        hidden_size=trunk.embed_dim,
        intermediate_size=blocks[0].mlp.fc1.out_features,
        num_hidden_layers=len(blocks),
        num_attention_heads=blocks[0].attn.num_heads,
        image_size=image_size,
        patch_size=trunk.patch_embed.patch_size[0],
        hidden_act=_activation(block.mlp.act for block in blocks),
        layer_norm_eps=_epsilon(blocks.modules()),
        vision_use_head=False,  # the pooling that comes after the features
    )
    return StockVision(config, weights, class_tokens=0)


def _expect(blocks: Iterable[nn.Module], kind: type[nn.Module]) -> None:
    other = {type(block).__name__ for block in blocks if type(block) is not kind}
    if other:
        raise NoStockModelError(f"its blocks are {', '.join(sorted(other))}")


def _all_names(
    outer: Mapping[str, str], blocks: str, inner: Mapping[str, str], fused: str, depth: int
) -> dict[str, list[str]]:
    """For each weight of an encoder its names in transformers: three where queries, keys and values are one matrix."""
    names = {ours: [theirs] for ours, theirs in outer.items()}
    for i in range(depth):
        a, b = f"{blocks}.{i}", f"encoder.layers.{i}"
        for kind in ("weight", "bias"):
            names[f"{a}.{fused}{kind}"] = [f"{b}.self_attn.{part}_proj.{kind}" for part in "qkv"]
            names |= {f"{a}.{ours}.{kind}": [f"{b}.{theirs}.{kind}"] for ours, theirs in inner.items()}
    return names


def _renamed(state: Mapping[str, Tensor], names: Mapping[str, list[str]]) -> dict[str, Tensor]:
    """Rename the weights for transformers; the names match one to one."""
    odd = sorted({*state} ^ {*names})
    if odd:
        raise NoStockModelError(
            f"it {'has' if odd[0] in state else 'lacks'} {odd[0]}, unlike a plain ViT of CLIP or SigLIP"
        )
    weights: dict[str, Tensor] = {}
    for ours, theirs in names.items():
        parts = state[ours].detach().chunk(len(theirs))
        weights |= {name: part.clone() for name, part in zip(theirs, parts, strict=True)}
    # Unused: these come after the features, and the encoder no longer has them.
    norm = weights["encoder.layers.0.layer_norm1.weight"]
    weights["post_layernorm.weight"] = torch.ones_like(norm)
    weights["post_layernorm.bias"] = torch.zeros_like(norm)
    return weights


def _activation(modules: Iterable[nn.Module]) -> str:
    """Return the name of the function of activation modules, whose classes have many names."""
    x = torch.linspace(-4, 4, 101, device="cpu")
    found = set()
    for kind, module in {type(module): module for module in modules}.items():
        same = [name for name in ACTIVATIONS if torch.allclose(ACT2FN[name](x), module(x), rtol=0, atol=1e-6)]
        found.add(same[0] if same else kind.__name__)
    if len(found) > 1 or not found <= {*ACTIVATIONS}:
        raise NoStockModelError(f"its activation is {', '.join(sorted(found))}")
    return found.pop()


def _epsilon(modules: Iterable[nn.Module]) -> float:
    found = {module.eps for module in modules if isinstance(module, nn.LayerNorm)}
    if len(found) != 1:
        raise NoStockModelError(f"its layer norms have {len(found)} different epsilons")
    return found.pop()
