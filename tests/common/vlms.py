"""Small vision-language models of Hugging Face, with random weights, their tokenizers and processors."""

from copy import deepcopy
from functools import cache

from composer.utils import reproducibility
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2TokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

KINDS = ("llava", "qwen2_vl", "idefics3")
BOS, EOS, PAD, NEWLINE = 0, 1, 2, 3
WORDS = range(4, 60)
SPECIAL = {
    "llava": ["<image>"],
    "qwen2_vl": ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"],
    "idefics3": ["<image>", "<fake_token_around_image>", "<global-img>", "<row_1_col_1>", "<row_1_col_2>"],
}
VOCABULARY = 64 + 8
LM = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}


@cache
def make_tokenizer(kind):
    """Words w4 … w59, a line break, and the tokens of the model's image layout."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

    vocab = {"<bos>": BOS, "<eos>": EOS, "<pad>": PAD, "\n": NEWLINE, **{f"w{i}": i for i in WORDS}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|w\d+"), "isolated")
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<bos>", "<eos>", "<pad>")])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL[kind]])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


def make_vlm(kind):
    """Build a model of random weights."""
    reproducibility.seed_all(3)
    ids = make_tokenizer(kind).convert_tokens_to_ids
    if kind == "llava":
        vision = CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        )
        config = LlavaConfig(
            vision_config=vision,
            text_config=LlamaConfig(**LM),
            image_token_index=ids("<image>"),
            vision_feature_layer=-1,
        )
        return LlavaForConditionalGeneration(config)
    if kind == "qwen2_vl":
        config = Qwen2VLConfig(
            text_config={**LM, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}},
            vision_config={
                "depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4
            },
            image_token_id=ids("<|image_pad|>"),
            video_token_id=ids("<|video_pad|>"),
            vision_start_token_id=ids("<|vision_start|>"),
            vision_end_token_id=ids("<|vision_end|>"),
        )  # fmt: skip
        return Qwen2VLForConditionalGeneration(config)
    config = Idefics3Config(
        text_config=LlamaConfig(**LM),
        vision_config={
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 16, "patch_size": 4,
        },
        image_token_id=ids("<image>"),
        scale_factor=2,
        pad_token_id=PAD,
    )  # fmt: skip
    return Idefics3ForConditionalGeneration(config)


def make_processor(kind):
    """Build the processor of the model: images of 16 pixels, tiles of 16, or patches of 4."""
    tokenizer = deepcopy(make_tokenizer(kind))
    if kind == "llava":
        size = {"height": 16, "width": 16}
        images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size)
        return LlavaProcessor(
            images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
        )
    if kind == "qwen2_vl":
        backend = deepcopy(tokenizer.backend_tokenizer)
        tokenizer = Qwen2TokenizerFast(
            tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", unk_token="<pad>"
        )
        sizes = {"patch_size": 4, "min_pixels": 64, "max_pixels": 1024}
        return Qwen2VLProcessor(Qwen2VLImageProcessor(**sizes), tokenizer, Qwen2VLVideoProcessor(**sizes))
    images = Idefics3ImageProcessor(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    return Idefics3Processor(images, tokenizer, image_seq_len=4)
