"""The LVLM as a model of transformers: configuration, image processor, processor and model.

A folder of :func:`.save_pretrained` holds a copy of this file, so ``trust_remote_code=True`` loads it where
composer_prior is not installed; it therefore imports nothing of the package. It needs open_clip_torch for a tower of
OpenCLIP. composer_prior's own modules use the parts of it that say what an image becomes.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BatchFeature,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import load_image
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.processing_utils import ProcessorMixin

IMAGE_TOKEN = "<image>"
ROW_TOKEN = "<row>"
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}<image>{%- elif part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- if message['role'] == 'assistant' -%}{{ eos_token }}{%- endif -%}"
    "{%- endfor -%}"
)
# Names by which configurations say that the logits are scaled after the head, with the factor that each means, ...
LOGIT_SCALES = {
    "logit_scale": float,  # Cohere
    "logits_scaling": lambda divisor: 1 / divisor,  # Granite
    "lm_head_multiplier": float,  # Falcon H1
}
# ... and softly capped: Gemma 2 and 3, RecurrentGemma, xLSTM.
LOGIT_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


class PriorLVLMConfig(PretrainedConfig):
    """Configuration of :class:`PriorLVLMForConditionalGeneration`.

    Args:
        text_config: of the causal language model.
        vision: the tower: ``{"type": "open_clip", "embed_dim", "vision_cfg", "quick_gelu", "layer", "width",
            "image_tokens", "preprocess"}``, or ``{"type": "patches", "patch_size", "max_side", "width"}``.
        projector: ``linear``, ``mlp``, or None for none.
        image_token_id, row_token_id: ids of the tokens in whose places images and ends of their rows stand.
    """

    model_type = "prior_lvlm"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012 - as transformers has it

    def __init__(
        self,
        text_config: Any = None,
        vision: Mapping[str, Any] | None = None,
        projector: str | None = None,
        image_token_id: int = 0,
        row_token_id: int = 0,
        **kwargs: Any,
    ):
        if isinstance(text_config, Mapping):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config = text_config if text_config is not None else AutoConfig.for_model("llama")
        self.vision = dict(vision or {"type": "patches", "patch_size": 16, "max_side": 512, "width": 4096})
        self.projector = projector
        self.image_token_id, self.row_token_id = image_token_id, row_token_id
        kwargs.setdefault("tie_word_embeddings", bool(self.text_config.tie_word_embeddings))
        super().__init__(**kwargs)


def logit_transform(config: PretrainedConfig) -> tuple[float, float | None]:
    """Factor and soft cap of the logits that a language model's configuration asks for after its head."""
    scales = [f(value) for name, f in LOGIT_SCALES.items() if (value := getattr(config, name, None)) is not None]
    softcaps = [value for name in LOGIT_SOFTCAPS if (value := getattr(config, name, None)) is not None]
    return math.prod(scales), softcaps[0] if softcaps else None


def decoder_of(causal_lm: PreTrainedModel) -> nn.Module:
    """What stands under the head: the part that holds the embeddings, for names differ and some classes lack one."""
    embeddings = causal_lm.get_input_embeddings()
    return next(part for part in causal_lm.children() if any(module is embeddings for module in part.modules()))


def build_encoder(vision: Mapping[str, Any]) -> nn.Module:
    """The OpenCLIP encoder of a configuration, up to its layer, with random weights."""
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
    """``[B, N, width]`` patch features of the last block that is left of an OpenCLIP encoder."""
    return encoder.forward_intermediates(
        pixel_values, indices=1, stop_early=True, intermediates_only=True, output_fmt="NLC"
    )["image_intermediates"][-1]


def cut_patches(image: Image.Image, patch_size: int, max_side: int) -> tuple[Tensor, int, int]:
    """Cut an RGB image into patches in raster order: ``[N, 3 P P]`` float32 in [-1, 1], rows and columns.

    The longer side is rounded to the patch grid and capped at ``max_side``; the other keeps the aspect ratio as nearly
    as the grid allows.
    """
    rows, columns = patch_grid(image.height, image.width, patch_size, max_side)
    image = image.resize((columns * patch_size, rows * patch_size), Image.Resampling.BICUBIC)
    pixels = pil_to_tensor(image).float().div_(127.5).sub_(1.0)  # [3, H, W]
    patches = pixels.reshape(3, rows, patch_size, columns, patch_size).permute(1, 3, 0, 2, 4)  # [h, w, 3, P, P]
    return patches.flatten(2).flatten(0, 1), rows, columns


def patch_grid(height: int, width: int, patch_size: int, max_side: int) -> tuple[int, int]:
    """Rows and columns of patches of an image of ``height`` x ``width`` pixels."""
    long_side = max(height, width)
    target = min(max_side, max(1, round(long_side / patch_size)) * patch_size)
    rows, columns = (max(1, round(side * target / long_side / patch_size)) for side in (height, width))
    return rows, columns


class PriorLVLMImageProcessor(BaseImageProcessor):
    """What an image becomes: ``pixel_values [B, 3, H, W]``, or ``pixel_patches [B, N, 3 P P]`` and ``patch_mask``.

    Args:
        vision: the tower, as in :class:`PriorLVLMConfig`.
    """

    model_input_names = ["pixel_values", "pixel_patches", "patch_mask"]  # noqa: RUF012 - as transformers has it

    def __init__(self, vision: Mapping[str, Any] | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.vision = dict(vision or {})

    def process(self, image: Image.Image) -> tuple[dict[str, Tensor], list[bool]]:
        """The tensors of one image, and for each of its positions in the text whether a row ends there."""
        image = image.convert("RGB")
        if self.vision["type"] == "patches":
            patches, rows, columns = cut_patches(image, self.vision["patch_size"], self.vision["max_side"])
            return {"pixel_patches": patches}, ([False] * columns + [True]) * rows
        from open_clip.transform import PreprocessCfg, image_transform_v2

        transform = image_transform_v2(PreprocessCfg(**self.vision["preprocess"]), is_train=False)
        return {"pixel_values": transform(image)}, [False] * self.vision["image_tokens"]

    def batch(self, images: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Stack the tensors of images; patches are padded at their end."""
        if "pixel_values" in images[0]:
            return {"pixel_values": torch.stack([image["pixel_values"] for image in images])}
        patches = [image["pixel_patches"] for image in images]
        lengths = torch.tensor([len(p) for p in patches])
        return {
            "pixel_patches": nn.utils.rnn.pad_sequence(patches, batch_first=True),
            "patch_mask": torch.arange(int(lengths.max())) < lengths[:, None],
        }

    def preprocess(self, images: Any, return_tensors: Any = "pt", **kwargs: Any) -> BatchFeature:
        """The tensors of one image or of several: Pillow's, arrays, paths or addresses."""
        return BatchFeature(self.batch([self.process(image)[0] for image in flat_images(images)]), return_tensors)


def flat_images(images: Any) -> list[Image.Image]:
    """Images in a list, nested or not, as Pillow's."""
    if isinstance(images, (list, tuple)):
        return [one for image in images for one in flat_images(image)]
    if isinstance(images, (str, Image.Image)):
        return [load_image(images)]
    pixels = np.asarray(images)  # [H, W, 3], or [3, H, W] as torch has it
    return [Image.fromarray(pixels.transpose(1, 2, 0) if pixels.shape[0] == 3 else pixels)]


class PriorLVLMProcessor(ProcessorMixin):
    """Images and text as the model's input: a beginning of sequence, the image in the place of ``<image>``, the text.

    Every piece of text is read on its own, as in training, and the sequence begins with the beginning-of-sequence token
    once, whether the text spells it or not.

    Args:
        image_processor: a :class:`PriorLVLMImageProcessor`.
        tokenizer: of the language model, with the image tokens.
        prompt: text between image and caption in training, which stands where no text is given.
        chat_template: see transformers. Default: the parts one after the other.
    """

    attributes = ["image_processor", "tokenizer"]  # noqa: RUF012 - as transformers has it
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, prompt: str = "", chat_template: str | None = None
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)
        self.prompt = prompt
        self.image_token = IMAGE_TOKEN
        self.image_token_id, self.row_token_id = map(tokenizer.convert_tokens_to_ids, (IMAGE_TOKEN, ROW_TOKEN))
        bos = tokenizer.bos_token_id
        self.bos_id = bos if bos is not None else tokenizer.eos_token_id
        # Texts are read piece by piece and then padded, of which transformers 4 would advise against.
        getattr(tokenizer, "deprecation_warnings", {})["Asking-to-pad-a-fast-tokenizer"] = True

    @property
    def model_input_names(self) -> list[str]:
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        padding: Any = False,
        padding_side: str | None = None,
        add_special_tokens: bool = True,
        truncation: Any = False,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_tensors: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """``input_ids`` and ``attention_mask`` ``[B, T]``, and the tensors of the images.

        Args:
            images: one image or several, in the order in which the texts name them.
            text: one text or several, each with ``<image>`` once for each of its images. Default: that and the prompt
                of training, for each image.
            padding, padding_side, max_length, pad_to_multiple_of, return_tensors: as a tokenizer's.
            add_special_tokens: begin text without an image, too, with the beginning-of-sequence token.
            truncation: cut sequences after ``max_length`` tokens.

        Raises:
            ValueError: if texts and images differ in number, or an image would be cut.
        """
        pictures = [self.image_processor.process(image) for image in flat_images(images if images is not None else [])]
        if text is None:
            text = [IMAGE_TOKEN + self.prompt] * len(pictures)
        texts = [text] if isinstance(text, str) else list(text)
        named = sum(one.count(IMAGE_TOKEN) for one in texts)
        if named != len(pictures):
            raise ValueError(f"The text names {named} images with {IMAGE_TOKEN}, and {len(pictures)} are given.")
        layouts = iter(layout for _, layout in pictures)
        ids = [self._ids(one, layouts, add_special_tokens) for one in texts]
        if truncation and max_length is not None:
            cut = [row[max_length:] for row in ids]
            if any({self.image_token_id, self.row_token_id} & set(row) for row in cut):
                raise ValueError(f"max_length={max_length} cuts an image; give more.")
            ids = [row[:max_length] for row in ids]
        padded = self.tokenizer.pad(
            {"input_ids": ids},
            padding=padding,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=padding_side,
            return_tensors=None,
        )
        tensors = self.image_processor.batch([tensors for tensors, _ in pictures]) if pictures else {}
        tokens = {key: padded[key] for key in ("input_ids", "attention_mask")}
        return BatchFeature({**tokens, **tensors}, return_tensors)

    def _ids(self, text: str, layouts: Any, add_special_tokens: bool) -> list[int]:
        pieces = text.split(IMAGE_TOKEN)
        ids: list[int] = []
        for number, piece in enumerate(pieces):
            if number:
                ids += [self.row_token_id if row_ends else self.image_token_id for row_ends in next(layouts)]
            if piece:
                ids += self.tokenizer(piece, add_special_tokens=False)["input_ids"]
        if (len(pieces) > 1 or add_special_tokens) and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids


class PriorLVLMVision(nn.Module):
    """The tower: features ``[n, width]`` of every image token, in reading order."""

    def __init__(self, vision: Mapping[str, Any]):
        super().__init__()
        if vision["type"] == "patches":
            self.proj = nn.Linear(3 * vision["patch_size"] ** 2, vision["width"])
        else:
            self.encoder = build_encoder(vision)

    def forward(self, pixel_values: Tensor | None, pixel_patches: Tensor | None, patch_mask: Tensor | None) -> Tensor:
        dtype = next(self.parameters()).dtype
        if pixel_values is not None:
            return encoder_features(self.encoder, pixel_values.to(dtype)).flatten(0, 1)
        if pixel_patches is None or patch_mask is None:
            raise ValueError("Images are pixel_values, or pixel_patches with patch_mask.")
        return self.proj(pixel_patches.to(dtype)[patch_mask])


def projector_layers(name: str | None, width_in: int, width_out: int) -> nn.Module:
    """From the tower's width to the LM's: ``linear``, or ``mlp``, two layers with a GELU between (LLaVA-1.5)."""
    if name is None:
        return nn.Identity()
    if name == "linear":
        return nn.Linear(width_in, width_out)
    if name == "mlp":
        return nn.Sequential(nn.Linear(width_in, width_out), nn.GELU(), nn.Linear(width_out, width_out))
    raise ValueError(f"model.projector.name={name!r}: expected `linear` or `mlp`.")


class PriorLVLMPreTrainedModel(PreTrainedModel):
    """What transformers has to know of either model."""

    config_class = PriorLVLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _skip_keys_device_placement = "past_key_values"
    input_modalities = ("image", "text")

    def _init_weights(self, module: nn.Module) -> None:
        """Parts initialise themselves when they are built; transformers 5 leaves empty then what is in no file."""
        if hasattr(module, "init_non_persistent_buffers"):  # of timm
            module.init_non_persistent_buffers()


class PriorLVLMModel(PriorLVLMPreTrainedModel):
    """Tower, projector and the language model's decoder."""

    def __init__(self, config: PriorLVLMConfig, language_model: nn.Module):
        super().__init__(config)
        self.language_model = language_model
        self.vision_tower = PriorLVLMVision(config.vision)
        width: Any = self.get_input_embeddings().weight.shape[1]
        self.multi_modal_projector = projector_layers(config.projector, config.vision["width"], width)
        self._accepted = set(inspect.signature(language_model.forward).parameters)

    def get_input_embeddings(self) -> Any:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_decoder(self) -> nn.Module:
        return self.language_model

    def get_image_features(
        self,
        pixel_values: Tensor | None = None,
        pixel_patches: Tensor | None = None,
        patch_mask: Tensor | None = None,
    ) -> Tensor:
        """``[n, D]`` projected features of every image token."""
        return self.multi_modal_projector(self.vision_tower(pixel_values, pixel_patches, patch_mask))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_patches: Tensor | None = None,
        patch_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None or pixel_patches is not None:
            features = self.get_image_features(pixel_values, pixel_patches, patch_mask)
            places = input_ids == self.config.image_token_id
            if not torch.compiler.is_compiling() and (count := int(places.sum())) != len(features):
                raise ValueError(f"The images have {len(features)} features, and input_ids {count} image tokens.")
            inputs_embeds = inputs_embeds.masked_scatter(places[..., None], features.to(inputs_embeds.dtype))
        passed = {key: value for key, value in kwargs.items() if key in self._accepted and value is not None}
        passed |= {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask, "return_dict": True}
        outputs = self.language_model(**passed)
        rest = {key: outputs.get(key) for key in ("past_key_values", "hidden_states", "attentions")}
        return BaseModelOutputWithPast(last_hidden_state=outputs.last_hidden_state, **rest)


class PriorLVLMForConditionalGeneration(PriorLVLMPreTrainedModel, GenerationMixin):
    """The LVLM: tower, projector and a causal language model of any family.

    Args:
        config: its configuration.
        causal_lm: the language model; default: a new one of ``config.text_config``.
    """

    def __init__(self, config: PriorLVLMConfig, causal_lm: PreTrainedModel | None = None):
        super().__init__(config)
        if causal_lm is None:
            causal_lm = AutoModelForCausalLM.from_config(config.text_config)
        self.model = PriorLVLMModel(config, decoder_of(causal_lm))
        self.lm_head = causal_lm.get_output_embeddings()
        self.__dict__["causal_lm"] = causal_lm  # the same modules as a language model, outside of this one's weights
        self.logit_scale, self.logit_softcap = logit_transform(config.text_config)
        if config.tie_word_embeddings:  # the name of the embeddings is the language model's
            embeddings = self.get_input_embeddings()
            name = next(name for name, module in self.named_modules() if module is embeddings)
            self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()

    def get_input_embeddings(self) -> Any:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings
        self.causal_lm.set_output_embeddings(new_embeddings)

    def get_decoder(self) -> nn.Module:
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
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cache_position: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits ``[B, T, V]``, and with labels ``[B, T]`` (-100: none) the mean loss of the next token.

        Args:
            input_ids: ``[B, T]`` int64 with image tokens.
            pixel_values: ``[B, 3, H, W]``, or
            pixel_patches: ``[B, N, 3 P P]`` with
            patch_mask: ``[B, N]`` bool, True for patches that are no padding.
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

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, past_key_values: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Images go in with the first tokens; after that, the cache holds them."""
        inputs = super().prepare_inputs_for_generation(input_ids, past_key_values=past_key_values, **kwargs)
        if past_key_values is not None and past_key_values.get_seq_length() > 0:
            inputs.update(pixel_values=None, pixel_patches=None, patch_mask=None)
        return inputs


PriorLVLMConfig.register_for_auto_class()
PriorLVLMImageProcessor.register_for_auto_class("AutoImageProcessor")
PriorLVLMProcessor.register_for_auto_class("AutoProcessor")
PriorLVLMForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
