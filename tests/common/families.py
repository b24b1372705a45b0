"""Model folders of transformers' vision-language families as a hub has them: small, random, with processor."""

from pathlib import Path

from composer.utils import reproducibility
from tokenizers import normalizers
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessor,
    Gemma3ImageProcessor,
    Gemma3Processor,
    GemmaTokenizerFast,
    GotOcr2ImageProcessorFast,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    PaliGemmaProcessor,
    Qwen2_5_VLProcessor,
    Qwen2TokenizerFast,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    SiglipImageProcessor,
)

from common.tokenizers import plain_tokenizer

LM = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
ROPE = {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SQUARE = {"height": 16, "width": 16}
QWEN_TOKENS = {"additional_special_tokens": ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]}
QWEN_SIZES = {"patch_size": 4, "min_pixels": 64, "max_pixels": 1024}
# Kind of tokenizer, its further special tokens, and the arguments of the configuration.
FAMILIES = {
    "llava": (
        "llama3",
        {"additional_special_tokens": ["<image>"]},
        {
            "text_config": {"model_type": "llama", **LM},
            "vision_config": {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 4, **TOWER},
        },
    ),
    "llava_next": (
        "llama3",
        {"additional_special_tokens": ["<image>"]},
        {
            "text_config": {"model_type": "llama", **LM},
            "vision_config": {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 4, **TOWER},
            "image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]],
        },
    ),
    "llava_onevision": (
        "qwen2",
        {"additional_special_tokens": ["<image>", "<video>"]},
        {
            "text_config": {"model_type": "qwen2", **LM},
            "vision_config": {
                "model_type": "siglip_vision_model", "image_size": 16, "patch_size": 4, "vision_use_head": False,
                **TOWER,
            },
            "image_grid_pinpoints": [[16, 16], [16, 32], [32, 16], [32, 32]],
        },
    ),
    "qwen2_vl": (
        "qwen2",
        QWEN_TOKENS,
        {
            "text_config": {**LM, **ROPE},
            "vision_config": {
                "depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4
            },
        },
    ),
    "qwen2_5_vl": (
        "qwen2",
        QWEN_TOKENS,
        {
            "text_config": {**LM, **ROPE},
            "vision_config": {
                "depth": 2, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 32,
                "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1],
            },
        },
    ),
    "idefics3": (
        "smollm2",
        {
            "additional_special_tokens": [
                "<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>",
                *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)),
            ]
        },
        {
            "text_config": {"model_type": "llama", **LM},
            "vision_config": {"image_size": 16, "patch_size": 4, **TOWER},
            "scale_factor": 2,
        },
    ),
    "internvl": (
        "qwen2",
        {
            "extra_special_tokens": {
                "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
                "video_token": "<video>",
            }
        },
        {
            "text_config": {"model_type": "qwen2", **LM},
            "vision_config": {"image_size": [16, 16], "patch_size": [4, 4], **TOWER},
        },
    ),
    "gemma3": (
        "llama3",
        {
            "extra_special_tokens": {
                "image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"
            }
        },
        {
            "text_config": {"model_type": "gemma3_text", "head_dim": 16, "sliding_window": 64, **LM},
            "vision_config": {
                "model_type": "siglip_vision_model", "image_size": 16, "patch_size": 4, "vision_use_head": False,
                **TOWER,
            },
            "mm_tokens_per_image": 4,
        },
    ),
    "paligemma": (
        "llama2",
        {"extra_special_tokens": {"image_token": "<image>"}},
        {
            "text_config": {"model_type": "gemma", "head_dim": 16, **LM},
            "vision_config": {
                "model_type": "siglip_vision_model", "image_size": 16, "patch_size": 4, "vision_use_head": False,
                "projection_dim": 32, **TOWER,
            },
            "projection_dim": 32,
        },
    ),
}  # fmt: skip


def save_family(kind: str, folder: Path, captions: list[str]) -> None:
    """Write the folder of a model of random weights, its tokenizer trained on captions."""
    tokenizer_kind, tokens, arguments = FAMILIES[kind]
    tokenizer = plain_tokenizer(tokenizer_kind, captions)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if kind == "paligemma":  # Gemma's writes no space before a text
        tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.save_pretrained(folder)
    own = {"qwen": Qwen2TokenizerFast, "pali": GemmaTokenizerFast}.get(kind[:4], type(tokenizer))
    named_tokens = {key: value for key, value in tokens.items() if isinstance(value, dict)}
    tokenizer = own.from_pretrained(folder, model_input_names=["input_ids", "attention_mask"], **named_tokens)
    tokenizer.add_tokens(tokens.get("additional_special_tokens", []), special_tokens=True)
    processor = _processor(kind, tokenizer)
    processor.save_pretrained(folder)
    ids = processor.tokenizer.convert_tokens_to_ids
    named = {"image_token_id": ids({"gemma3": "<image_soft_token>", "internvl": "<IMG_CONTEXT>"}.get(kind, "<image>"))}
    if kind.startswith("qwen"):
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        named = dict(
            zip(names, ids(["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]), strict=True)
        )
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {"vocab_size": len(processor.tokenizer), **ends, **arguments["text_config"]}
    reproducibility.seed_all(3)
    config = AutoConfig.for_model(kind, **{**arguments, **named, "text_config": text, "tie_word_embeddings": False})
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    AutoProcessor.from_pretrained(folder)


def _processor(kind: str, tokenizer):
    if kind == "llava":
        images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=SQUARE)
        return LlavaProcessor(
            images, tokenizer, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1
        )
    if kind == "llava_next":
        pinpoints = FAMILIES[kind][2]["image_grid_pinpoints"]
        images = LlavaNextImageProcessor(size={"shortest_edge": 16}, crop_size=SQUARE, image_grid_pinpoints=pinpoints)
        return LlavaNextProcessor(
            images, tokenizer, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1
        )
    if kind == "llava_onevision":
        pinpoints = FAMILIES[kind][2]["image_grid_pinpoints"]
        images = LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=pinpoints)
        videos = LlavaOnevisionVideoProcessor(size=SQUARE)
        return LlavaOnevisionProcessor(images, tokenizer, videos, 16, "full")
    if kind in ("qwen2_vl", "qwen2_5_vl"):
        made = Qwen2VLProcessor if kind == "qwen2_vl" else Qwen2_5_VLProcessor
        return made(Qwen2VLImageProcessor(**QWEN_SIZES), tokenizer, Qwen2VLVideoProcessor(**QWEN_SIZES))
    if kind == "idefics3":
        images = Idefics3ImageProcessor(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
        return Idefics3Processor(images, tokenizer, image_seq_len=4)
    if kind == "internvl":
        images = GotOcr2ImageProcessorFast(size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=4)
        return InternVLProcessor(images, tokenizer, InternVLVideoProcessor(size=SQUARE), image_seq_length=4)
    if kind == "gemma3":
        return Gemma3Processor(Gemma3ImageProcessor(size=SQUARE), tokenizer, image_seq_length=4)
    images = SiglipImageProcessor(size=SQUARE)
    images.image_seq_length = 16
    return PaliGemmaProcessor(images, tokenizer)
