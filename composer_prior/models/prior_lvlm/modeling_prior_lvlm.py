"""The LVLM: a vision tower, a projector and a causal language model of any family.

:class:`PriorLVLMModel` puts the features of images in the places of image tokens and runs the language model's decoder;
:class:`PriorLVLMForConditionalGeneration` adds the head. A tower of OpenCLIP needs open_clip_torch, NaFlex timm.
"""

import inspect
import math
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_prior_lvlm import PriorLVLMConfig

# Names by which configurations say that the logits are scaled after the head, with the factor that each means, ...
LOGIT_SCALES = {
    "logit_scale": float,  # Cohere
    "logits_scaling": lambda divisor: 1 / divisor,  # Granite
    "lm_head_multiplier": float,  # Falcon H1
}
# ... and softly capped: Gemma 2 and 3, RecurrentGemma, xLSTM.
LOGIT_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
MERGING = ("pixel_shuffle", "mean_pool")  # projectors that make one image token of several features


class EncoderTower(nn.Module):
    """Patch features of the last block of an encoder, without class token.

    One whose weights are all frozen runs in evaluation mode and records no gradients.

    Args:
        vision: as in :class:`.PriorLVLMConfig`.
        encoder: OpenCLIP's or timm's, without later blocks. Default: a new one with random weights.
    """

    def __init__(self, vision: Mapping[str, Any], encoder: nn.Module | None = None):
        super().__init__()
        self.config = dict(vision)
        self.encoder = build_encoder(vision) if encoder is None else encoder

    @property
    def blocks(self) -> list[nn.Module]:
        """The encoder's transformer blocks."""
        return list(encoder_blocks(self.encoder))

    @property
    def frozen(self) -> bool:
        """True if no weight is trained."""
        return not any(parameter.requires_grad for parameter in self.parameters())

    def train(self, mode: bool = True) -> Self:
        """Set training mode, unless the tower is frozen."""
        return super().train(mode and not self.frozen)


class OpenCLIPTower(EncoderTower):
    """Features of an OpenCLIP encoder, ``pixel_values [B, 3, H, W] -> [B * N, width]``.

    Of tiles, ``pixel_values`` are ``[B, T, 3, H, W]``, padded where ``image_grid [B, 2]`` has fewer rows and columns.
    """

    @property
    def image_size(self) -> int:
        """Side of the square input in pixels."""
        size = self.encoder.image_size
        return size if isinstance(size, int) else size[0]

    def forward(self, pixel_values: Tensor, image_grid: Tensor | None = None) -> Tensor:
        """Return the features of every patch, in reading order; of each block that is merged together."""
        if image_grid is not None:
            tiles = image_grid.prod(1, keepdim=True)
            tiles = tiles + (tiles > 1)  # the whole image in one
            pixel_values = pixel_values[torch.arange(pixel_values.shape[1], device=tiles.device) < tiles]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = encoder_features(self.encoder, pixel_values.to(next(self.parameters()).dtype))
        if (merge := self.config.get("merge", 1)) > 1:
            cells = math.isqrt(features.shape[1]) // merge
            features = features.unflatten(1, (cells, merge, cells, merge)).transpose(2, 3).flatten(1, 4)
        return features.flatten(0, 1)


class NaFlexTower(EncoderTower):
    """Features of timm's NaFlexVit, ``pixel_patches [B, N, 3 P P] -> [n, width]`` of real patches in unlike grids."""

    def forward(self, pixel_patches: Tensor, patch_mask: Tensor, image_grid: Tensor) -> Tensor:
        """Return the features of every patch, in reading order; of each block that is merged together.

        ``patch_mask [B, N]`` is True on real patches, which are in raster order; ``image_grid [B, 2]`` has their rows
        and columns.
        """
        places, columns = torch.arange(pixel_patches.shape[1], device=image_grid.device), image_grid[:, 1:]
        coordinates = torch.stack([places // columns, places % columns], -1) * patch_mask[..., None]  # [B, N, 2]
        pixels = pixel_patches.to(next(self.parameters()).dtype)
        patches = pixels.unflatten(-1, (3, -1)).transpose(-1, -2).flatten(-2)  # timm has the channels last
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            (features,) = self.encoder.forward_intermediates(
                {"patches": patches, "patch_coord": coordinates, "patch_valid": patch_mask},
                indices=1,
                stop_early=True,
                intermediates_only=True,
                output_fmt="NLC",
            )
        if (merge := self.config.get("merge", 1)) > 1:
            block, inside = places // merge**2, places % merge**2
            row = block // (columns // merge) * merge + inside // merge
            order = row * columns + block % (columns // merge) * merge + inside % merge  # [B, N], beyond N on padding
            features = features.take_along_dim(order.clamp(max=len(places) - 1)[..., None], 1)
        return features[patch_mask]


class PatchEmbedding(nn.Module):
    """Pixel patches through one linear layer, ``pixel_patches [B, N, 3 P P] -> [n, width]`` of the real patches."""

    def __init__(self, vision: Mapping[str, Any]):
        super().__init__()
        self.config = dict(vision)
        self.proj = nn.Linear(3 * vision["patch_size"] ** 2, vision["width"])

    def forward(self, pixel_patches: Tensor, patch_mask: Tensor) -> Tensor:
        """Return the features of every patch, in the order given; ``patch_mask [B, N]`` is True on real patches."""
        return self.proj(pixel_patches.to(next(self.parameters()).dtype)[patch_mask])


TOWERS = {"open_clip": OpenCLIPTower, "naflex": NaFlexTower, "patches": PatchEmbedding}


def build_encoder(vision: Mapping[str, Any]) -> nn.Module:
    """Build the encoder of a configuration, up to its layer, with random weights."""
    if vision["type"] == "naflex":
        import timm  # other towers do without

        encoder = timm.create_model(vision["architecture"], **vision["arguments"])
        prune_encoder(encoder, vision["layer"])
        return encoder
    from open_clip.model import _build_vision_tower

    settings = {**vision["vision_cfg"], "timm_model_pretrained": False}
    encoder = _build_vision_tower(vision["embed_dim"], settings, vision["quick_gelu"])
    if settings.get("timm_model_name") and hasattr(encoder, "set_input_size"):
        encoder.set_input_size(settings["image_size"])
    prune_encoder(encoder, vision["layer"])
    return encoder


def prune_encoder(encoder: Any, layer: int) -> None:
    """Remove all that comes after a block, counted from 0."""
    prunable = getattr(encoder, "trunk", encoder)  # timm's model inside OpenCLIP's wrapper
    prunable.prune_intermediate_layers(indices=[layer], prune_norm=True, prune_head=True)


def encoder_features(encoder: Any, pixel_values: Tensor) -> Tensor:
    """Return ``[B, N, width]`` patch features of the last block that is left of an OpenCLIP encoder."""
    return encoder.forward_intermediates(
        pixel_values, indices=1, stop_early=True, intermediates_only=True, output_fmt="NLC"
    )["image_intermediates"][-1]


def encoder_blocks(encoder: Any) -> Any:
    """Return the list of transformer blocks of an encoder of OpenCLIP or timm."""
    if hasattr(encoder, "transformer"):
        return encoder.transformer.resblocks
    trunk = getattr(encoder, "trunk", encoder)
    if hasattr(trunk, "blocks"):
        return trunk.blocks
    raise ValueError(f"{type(encoder).__name__} has no list of transformer blocks to take patch features from.")


class MergingProjector(nn.Sequential):
    """Two layers with a GELU on merged features, ``[n, width] -> [n / merge ** 2, D]``; a block stands together.

    Args:
        name: ``pixel_shuffle``, which lays the features of a block beside each other, or ``mean_pool``, their mean.
        merge: side of a block.
        width_in: of the features.
        width_out: ``D``.
    """

    def __init__(self, name: str, merge: int, width_in: int, width_out: int):
        first = nn.Linear(width_in * (merge**2 if name == "pixel_shuffle" else 1), width_out)
        super().__init__(first, nn.GELU(), nn.Linear(width_out, width_out))
        self.name, self.merge = name, merge

    def forward(self, features: Tensor) -> Tensor:
        """Return the projected features of every image token."""
        blocks = features.unflatten(0, (-1, self.merge**2))
        return super().forward(blocks.flatten(1) if self.name == "pixel_shuffle" else blocks.mean(1))


def build_projector(name: str | None, width_in: int, width_out: int, merge: int = 1) -> nn.Module:
    """Build what maps the tower's width to the LM's.

    ``linear``; ``mlp``, two layers with a GELU (LLaVA-1.5); or one that merges, see :class:`MergingProjector`.
    """
    if name is None:
        return nn.Identity()
    if name == "linear":
        return nn.Linear(width_in, width_out)
    if name == "mlp":
        return nn.Sequential(nn.Linear(width_in, width_out), nn.GELU(), nn.Linear(width_out, width_out))
    if name in MERGING:
        return MergingProjector(name, merge, width_in, width_out)
    raise ValueError(f"model.projector.name={name!r}: expected `linear`, `mlp`, `pixel_shuffle` or `mean_pool`.")


def logit_transform(config: PretrainedConfig) -> tuple[float, float | None]:
    """Return the factor and the soft cap of the logits that a language model's configuration asks for."""
    scales = [f(value) for name, f in LOGIT_SCALES.items() if (value := getattr(config, name, None)) is not None]
    softcaps = [value for name in LOGIT_SOFTCAPS if (value := getattr(config, name, None)) is not None]
    return math.prod(scales), softcaps[0] if softcaps else None


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """Return the part under the head: the child that holds the embeddings, for its name differs between families."""
    embeddings = model.get_input_embeddings()
    return next(part for part in model.children() if any(module is embeddings for module in part.modules()))


class PriorLVLMPreTrainedModel(PreTrainedModel):
    """Settings of both models for transformers."""

    config_class = PriorLVLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _skip_keys_device_placement = "past_key_values"
    input_modalities = ("image", "text")

    def _init_weights(self, module: nn.Module) -> None:
        """Leave weights as they are, for parts initialise themselves; transformers 5 leaves timm's buffers empty."""
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()


class PriorLVLMModel(PriorLVLMPreTrainedModel):
    """Tower, projector and the language model's decoder."""

    def __init__(self, config: PriorLVLMConfig, language_model: nn.Module, vision_tower: nn.Module | None = None):
        super().__init__(config)
        self.vision_tower = TOWERS[config.vision["type"]](config.vision) if vision_tower is None else vision_tower
        width: Any = language_model.get_input_embeddings().weight.shape[1]
        settings = config.vision
        self.multi_modal_projector = build_projector(
            config.projector, settings["width"], width, settings.get("merge", 1)
        )
        self.language_model = language_model
        self._accepted = set(inspect.signature(language_model.forward).parameters)

    def get_input_embeddings(self) -> Any:
        """Return the language model's embeddings."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's embeddings."""
        self.language_model.set_input_embeddings(value)

    def get_image_features(self, **images: Tensor) -> Tensor:
        """Return ``[n, D]`` projected features of every image token; the arguments are those of the tower."""
        return self.multi_modal_projector(self.vision_tower(**images))

    def embed(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        pixel_patches: Tensor | None = None,
        patch_mask: Tensor | None = None,
        image_grid: Tensor | None = None,
    ) -> Tensor:
        """Return input embeddings ``[B, T, D]``, image features in the places of the image tokens."""
        embeddings = self.get_input_embeddings()(input_ids)  # [B, T, D]
        given = {"pixel_values": pixel_values, "pixel_patches": pixel_patches, "patch_mask": patch_mask}
        given["image_grid"] = image_grid
        images = {name: tensor for name, tensor in given.items() if tensor is not None}
        features = self.get_image_features(**images) if images else embeddings.new_zeros(0, embeddings.shape[-1])
        places = input_ids == self.config.image_token_id
        if self.training and places.is_cuda:  # the host does not wait, and gets an error later
            torch._assert_async(places.sum() == len(features), "images and image tokens differ: cut captions alone")
        elif not torch.compiler.is_compiling() and (tokens := int(places.sum())) != len(features):
            raise ValueError(
                f"The images have {len(features)} features and input_ids {tokens} image tokens: cut captions alone"
            )
        if not images:
            return embeddings
        return embeddings.masked_scatter(places[..., None], features.to(embeddings.dtype))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_patches: Tensor | None = None,
        patch_mask: Tensor | None = None,
        image_grid: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return the decoder's hidden states ``[B, T, D]``, and its cache where it is asked for."""
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.embed(input_ids, pixel_values, pixel_patches, patch_mask, image_grid)
        passed = {key: value for key, value in kwargs.items() if key in self._accepted and value is not None}
        given = {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask, "return_dict": True}
        outputs = self.language_model(**{**passed, **given})
        rest = {key: outputs.get(key) for key in ("past_key_values", "hidden_states", "attentions")}
        return BaseModelOutputWithPast(last_hidden_state=outputs.last_hidden_state, **rest)


class PriorLVLMForConditionalGeneration(PriorLVLMPreTrainedModel, GenerationMixin):
    """The LVLM: tower, projector and a causal language model of any family.

    Args:
        config: its configuration.
        causal_lm: the language model, whose modules it takes. Default: a new one of ``config.text_config``.
        vision_tower: the tower. Default: a new one of ``config.vision``.
    """

    def __init__(
        self,
        config: PriorLVLMConfig,
        causal_lm: PreTrainedModel | None = None,
        vision_tower: nn.Module | None = None,
    ):
        super().__init__(config)
        if causal_lm is None:
            causal_lm = AutoModelForCausalLM.from_config(config.text_config)
            given = [vision_tower]
        else:
            given = [vision_tower, causal_lm]
        for part in filter(None, given):  # these keep their weights: post_init would draw new ones
            for one in (*part.modules(), *part.parameters()):
                one._is_hf_initialized = True
        self.model = PriorLVLMModel(config, decoder_of(causal_lm), vision_tower)
        self.lm_head = causal_lm.get_output_embeddings()
        self.__dict__["_causal_lm"] = causal_lm  # outside of this model's modules, which are its own
        blocks = {type(block).__name__ for block in getattr(self.model.vision_tower, "blocks", ())}
        self._no_split_modules = sorted({*(causal_lm._no_split_modules or ()), *blocks})
        self.logit_scale, self.logit_softcap = logit_transform(config.text_config)
        if config.tie_word_embeddings:  # the name of the embeddings is the language model's
            embeddings = self.get_input_embeddings()
            name = next(name for name, module in self.named_modules() if module is embeddings)
            self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()

    @property
    def causal_lm(self) -> Any:
        """The language model with its head, made of this model's modules."""
        causal_lm = self.__dict__["_causal_lm"]
        causal_lm.set_output_embeddings(self.lm_head)  # which adapters may have replaced
        causal_lm.generation_config = self.generation_config
        return causal_lm

    def get_decoder(self) -> nn.Module:
        """Return the language model's decoder."""
        return self.model.language_model

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_patches: Tensor | None = None,
        patch_mask: Tensor | None = None,
        image_grid: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cache_position: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits ``[B, T, V]``, and with labels ``[B, T]`` (-100: none) the mean loss of the next token.

        Text is ``input_ids [B, T]`` int64 with image tokens or ``inputs_embeds [B, T, D]``; images are ``pixel_values
        [B, 3, H, W]`` or ``pixel_patches [B, N, 3 P P]`` with ``patch_mask [B, N]``, True on real patches. Tiles and
        NaFlex, see their towers, have ``image_grid [B, 2]`` too.
        ``logits_to_keep`` is how many of the last positions get logits, 0 for all, or which ones. The other arguments
        are those of the language model, and ``kwargs`` those of the loss.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            pixel_patches=pixel_patches,
            patch_mask=patch_mask,
            image_grid=image_grid,
            use_cache=use_cache,
            cache_position=cache_position,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept]) * self.logit_scale
        if self.logit_softcap is not None:
            logits = self.logit_softcap * torch.tanh(logits / self.logit_softcap)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_patches: Tensor | None = None,
        patch_mask: Tensor | None = None,
        image_grid: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Continue text with the language model's own ``generate``, which knows the cache of its family.

        The ids ``[B, T]`` hold image tokens and are padded on the left, images are as in :meth:`forward`, and
        ``kwargs`` are those of ``generate``.

        Returns:
            ids ``[B, T + S]`` int64, or with ``return_dict_in_generate`` an output that has them.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        embeddings = self.model.embed(input_ids, pixel_values, pixel_patches, patch_mask, image_grid)
        found = self.causal_lm.generate(inputs_embeds=embeddings, attention_mask=attention_mask, **kwargs)
        new = found if isinstance(found, Tensor) else found.sequences
        ids = torch.cat([input_ids.repeat_interleave(len(new) // len(input_ids), 0), new], 1)
        if isinstance(found, Tensor):
            return ids
        found.sequences = ids
        return found


PriorLVLMForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
