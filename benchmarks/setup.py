"""Models, the same models in transformers, and batches for the benchmarks."""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from composer.algorithms import GradientClipping
from composer.core import Algorithm, DataSpec
from composer.trainer import Trainer
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainingArguments,
)
from transformers import Trainer as HuggingFaceTrainer

from benchmarks.measure import Stamps
from composer_prior.data.batch import IGNORE_INDEX, IMAGE, ImageInputs, count_tokens, stack_images
from composer_prior.data.tokenizer import add_image_tokens, image_token_ids
from composer_prior.models.build import make_lvlm
from composer_prior.models.composer_lvlm import ComposerLVLM
from composer_prior.models.vision import build_naflex, build_open_clip

HIDDEN, LAYERS, VOCABULARY, BATCH, MEDIAN_CAPTION = 256, 6, 49152, 16, 25
IMAGE_TOKENS, FIRST_WORD = 64, 16  # ids below are special
LEARNING_RATE, CLIPPING = 3e-4, 1.0
SQUARE = partial(build_open_clip, "prior-vit-tiny", image_size=288, layer=-1)  # of 24 x 24 patches
NAFLEX = {"embed_dim": 128, "depth": 4, "num_heads": 4, "mlp_ratio": 3.0}  # the sizes of prior-vit-tiny
FRONT_ENDS: dict[str, tuple[Callable[[], nn.Module], str, int]] = {  # tower, projector and its factor
    "mlp": (SQUARE, "mlp", 1),
    "pixel_shuffle by 2": (SQUARE, "pixel_shuffle", 2),
    "pixel_shuffle by 4": (SQUARE, "pixel_shuffle", 4),
    "tiles, 4 at most": (partial(SQUARE, tiles={"max": 4}), "mlp", 1),
    "tiles, pixel_shuffle by 2": (partial(SQUARE, tiles={"max": 4}), "pixel_shuffle", 2),
    "naflex, 256 at most": (
        partial(build_naflex, "naflexvit_base_patch16_siglip", patch_size=12, layer=-1, config=NAFLEX),
        "mlp",
        1,
    ),
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer of special tokens only; the captions of the benchmarks are ids."""
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    vocabulary = {token: i for i, token in enumerate(special.values())}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "<unk>")), **special)
    add_image_tokens(tokenizer)
    return tokenizer


def build_lm(vocabulary: int = VOCABULARY, layers: int = LAYERS) -> PreTrainedModel:
    """Build a Llama with tied embeddings, as in models of this vocabulary (SmolLM)."""
    return AutoModelForCausalLM.from_config(build_lm_config(vocabulary, layers))


def build_lm_config(vocabulary: int = VOCABULARY, layers: int = LAYERS) -> PretrainedConfig:
    """Build the configuration of the language model."""
    return AutoConfig.for_model(
        "llama",
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=688,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def build_ours(vocabulary: int = VOCABULARY) -> ComposerLVLM:
    """Build an LVLM: tower of 64 tokens, projector of two layers, language model."""
    torch.manual_seed(17)
    tower = build_open_clip("prior-vit-tiny", layer=-1)
    return ComposerLVLM(*make_lvlm(build_lm(vocabulary), tower, "mlp", build_tokenizer()))


def build_front_end(name: str) -> ComposerLVLM:
    """Build an LVLM with one of ``FRONT_ENDS``."""
    torch.manual_seed(17)
    tower, projector, factor = FRONT_ENDS[name]
    return ComposerLVLM(*make_lvlm(build_lm(), tower(), projector, build_tokenizer(), factor=factor))


def build_nanovlm(checkout: str) -> nn.Module:
    """Build nanoVLM's model with the sizes of ``pixel_shuffle by 2``, of a checkout of its repository."""
    sys.path.insert(0, checkout)
    tokenizer = SimpleNamespace(image_token_id=image_token_ids(build_tokenizer())[0])
    tokenizers: Any = SimpleNamespace(get_tokenizer=lambda *arguments: tokenizer)
    sys.modules["data.processors"] = tokenizers  # its own come from the hub
    from models.config import VLMConfig
    from models.vision_language_model import VisionLanguageModel

    torch.manual_seed(17)
    sizes = {
        "vit": {"hidden_dim": 128, "inter_dim": 384, "n_heads": 4, "n_blocks": 4, "img_size": 288, "patch_size": 12},
        "lm": {"hidden_dim": HIDDEN, "inter_dim": 688, "n_heads": 4, "n_kv_heads": 4, "n_blocks": LAYERS},
    }
    config = VLMConfig(
        **{f"{part}_{key}": value for part, given in sizes.items() for key, value in given.items()},
        lm_vocab_size=VOCABULARY,
        mp_pixel_shuffle_factor=2,
        mp_image_token_length=144,
    )
    return VisionLanguageModel(config, load_backbone=False)


def build_smolvlm(vocabulary: int = VOCABULARY) -> Idefics3ForConditionalGeneration:
    """Build a SmolVLM of transformers with the same language model, and 64 tokens for an image of 96 pixels."""
    torch.manual_seed(17)
    tower = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = Idefics3Config(
        text_config=build_lm_config(vocabulary).to_dict(),
        vision_config={**tower, "image_size": 96, "patch_size": 6},
        image_token_id=image_token_ids(build_tokenizer())[0],
        scale_factor=2,
        pad_token_id=0,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return Idefics3ForConditionalGeneration(config)


def wrap(model: PreTrainedModel) -> ComposerLVLM:
    """Wrap a model of transformers as recipes do; batches are made without its processor."""
    return ComposerLVLM(model, SimpleNamespace(tokenizer=build_tokenizer()))


def build_llava(ours: ComposerLVLM) -> LlavaForConditionalGeneration:
    """Build the same model with the same weights as a LLaVA of transformers."""
    lvlm: Any = ours.model
    encoder = lvlm.model.vision_tower.encoder
    blocks = encoder.transformer.resblocks
    vision = CLIPVisionConfig(
        hidden_size=encoder.conv1.out_channels,
        intermediate_size=blocks[0].mlp.c_fc.out_features,
        num_hidden_layers=len(blocks),
        num_attention_heads=blocks[0].attn.num_heads,
        image_size=lvlm.model.vision_tower.image_size,
        patch_size=encoder.conv1.kernel_size[0],
        hidden_act="gelu",
    )
    llava = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=lvlm.causal_lm.config,
            image_token_index=lvlm.config.image_token_id,
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            tie_word_embeddings=True,
            use_cache=False,
        )
    )
    tower: Any = llava.model.vision_tower
    clip = getattr(tower, "vision_model", tower)  # transformers 5 has it without this layer
    clip.load_state_dict(_clip_weights(encoder.state_dict(), len(blocks)), strict=False)
    projector: Any = llava.model.multi_modal_projector
    projector.linear_1.load_state_dict(lvlm.model.multi_modal_projector[0].state_dict())
    projector.linear_2.load_state_dict(lvlm.model.multi_modal_projector[2].state_dict())
    llava.model.language_model.load_state_dict(lvlm.causal_lm.model.state_dict())
    llava.tie_weights()
    return llava


def _clip_weights(ours: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Rename the weights of an OpenCLIP ViT for transformers."""
    theirs = {
        "embeddings.class_embedding": ours["class_embedding"],
        "embeddings.patch_embedding.weight": ours["conv1.weight"],
        "embeddings.position_embedding.weight": ours["positional_embedding"],
    }
    layer_names = {"attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2"}
    layer_names |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for kind in ("weight", "bias"):
        theirs[f"pre_layrnorm.{kind}"] = ours[f"ln_pre.{kind}"]
        for i in range(depth):
            a, b = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
            for name, part in zip("qkv", ours[f"{a}.attn.in_proj_{kind}"].chunk(3), strict=True):
                theirs[f"{b}.self_attn.{name}_proj.{kind}"] = part
            theirs |= {f"{b}.{new}.{kind}": ours[f"{a}.{old}.{kind}"] for old, new in layer_names.items()}
    return theirs


def caption_lengths(count: int, mean_of_log: float, sigma: float, longest: int, seed: int = 17) -> Tensor:
    """Draw log-normal lengths in tokens, ``[count]`` int64, at least 3."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (torch.randn(count, generator=generator) * sigma + mean_of_log).exp()
    return lengths.round().long().clamp(3, longest)


def training_batches(
    count: int,
    batch_size: int = BATCH,
    median: float = MEDIAN_CAPTION,
    vocabulary: int = VOCABULARY,
    image: ImageInputs | None = None,
) -> list[dict[str, Tensor]]:
    """Make batches of images and captions of log-normal length, with reference log-probabilities.

    Every image is ``image``, by default random pixels of ``IMAGE_TOKENS`` positions.
    """
    image_token_id, row_token_id = image_token_ids(build_tokenizer())
    layout = [IMAGE] * IMAGE_TOKENS if image is None else image.layout
    lengths = caption_lengths(count * batch_size, float(torch.tensor(median).log()), 0.5, 200)
    generator = torch.Generator().manual_seed(18)
    batches = []
    for rows in lengths.split(batch_size):
        captions = [torch.randint(FIRST_WORD, vocabulary, (n,), generator=generator) for n in rows.tolist()]
        prefix = torch.tensor([1, *(image_token_id if kind == IMAGE else row_token_id for kind in layout)])
        ids = [torch.cat([prefix, caption]) for caption in captions]
        labels = [torch.cat([torch.full_like(prefix, IGNORE_INDEX), caption]) for caption in captions]
        pad = nn.utils.rnn.pad_sequence
        batch = {
            "input_ids": pad(ids, batch_first=True),
            "attention_mask": pad([torch.ones_like(x) for x in ids], batch_first=True),
            "labels": pad(labels, batch_first=True, padding_value=IGNORE_INDEX),
        }
        if image is None:
            batch["pixel_values"] = torch.randn(batch_size, 3, 96, 96, generator=generator)
        else:
            batch |= stack_images([image.tensors] * batch_size)
        scores = -torch.rand(batch["labels"].shape, generator=generator) * 5
        batches.append(batch | {"ref_logprobs": scores.masked_fill(batch["labels"] == IGNORE_INDEX, 0.0)})
    return batches


def our_trainer(
    model: ComposerLVLM, batches: Sequence[dict[str, Tensor]], stamps: Stamps, algorithms: Sequence[Algorithm] = ()
) -> Any:
    """Return ``step(n)``, which runs n steps of Composer's Trainer and records them in ``stamps``."""
    trainer = Trainer(
        model=model,
        train_dataloader=DataSpec(
            _Batches(batches, stamps),
            get_num_samples_in_batch=lambda batch: len(batch["input_ids"]),
            get_num_tokens_in_batch=count_tokens,
        ),
        optimizers=adamw(model),
        algorithms=[*algorithms, GradientClipping(clipping_type="norm", clipping_threshold=CLIPPING)],
        callbacks=[stamps.composer()],
        max_duration="1000000ba",
        device_train_microbatch_size=len(batches[0]["input_ids"]),
        accumulate_train_batch_on_tokens=True,
        device="cpu",
        precision="fp32",
        progress_bar=False,
        loggers=[],
    )
    return lambda n: trainer.fit(duration=f"{n}ba")


def hugging_face_trainer(
    model: PreTrainedModel, batches: Sequence[dict[str, Tensor]], stamps: Stamps, folder: str, optimizer: str
) -> Any:
    """Return ``step(n)``, which runs n steps of transformers' Trainer with its usual settings."""
    keys = ("input_ids", "attention_mask", "labels", "pixel_values")
    data = _Batches([{key: batch[key] for key in keys} for batch in batches], stamps)

    class InOrder(HuggingFaceTrainer):
        def get_train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(data, batch_size=None)

    class Stamp(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            stamps.stamp()

    arguments = TrainingArguments(
        folder,
        use_cpu=True,
        optim=optimizer,
        learning_rate=LEARNING_RATE,
        adam_beta2=0.98,
        weight_decay=0.0,
        lr_scheduler_type="constant",
        max_grad_norm=CLIPPING,
        max_steps=1,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = InOrder(model=model, args=arguments, train_dataset=[None] * len(batches), callbacks=[Stamp()])
    compute_loss = trainer.compute_loss

    def with_record(*args: Any, **kwargs: Any) -> Any:
        loss = compute_loss(*args, **kwargs)
        stamps.losses.append(float(loss[0] if isinstance(loss, tuple) else loss))
        return loss

    trainer.compute_loss = with_record  # type: ignore[method-assign]
    trainer.log = lambda *args, **kwargs: None  # type: ignore[method-assign]

    def step(n: int) -> None:
        trainer.args.max_steps = n
        trainer.train()

    return step


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """Build AdamW with one pass over the weights per step."""
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True)


class _Batches(torch.utils.data.IterableDataset):
    """Cycle over the batches; the number of losses so far selects the next, as Composer reads ahead."""

    def __init__(self, batches: Sequence[dict[str, Tensor]], stamps: Stamps):
        self.batches = batches
        self.stamps = stamps

    def __iter__(self) -> Any:
        while True:
            yield dict(self.batches[len(self.stamps.losses) % len(self.batches)])  # PRIOR puts its scores into it
