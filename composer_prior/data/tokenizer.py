"""Tokenizers: loaded or trained on captions, the tokens that stand for an image, and fingerprints."""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Encoding, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from composer_prior.data.chat import use_template
from composer_prior.data.hub import ModelFolderError, load_pretrained
from composer_prior.data.messages import one_line

IMAGE_TOKEN = "<image>"
ROW_TOKEN = "<row>"
_QWEN = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")  # an image has its positions by the tokens around it
_PLACEHOLDERS = ("<start_of_image>", IMAGE_TOKEN, _QWEN[1], "[IMG]", "<IMG_CONTEXT>")  # Gemma 3 has two, this is first
SPECIAL_TOKENS = ["<pad>", "<bos>", "<eos>", IMAGE_TOKEN, ROW_TOKEN]
VOCAB_SIZES = range(256 + len(SPECIAL_TOKENS), 1_000_001)  # of a tokenizer that is trained


def build_tokenizer(config: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """Load the tokenizer ``name`` (a folder or hub id), with ``kwargs`` of ``AutoTokenizer.from_pretrained``.

    It adds the image tokens if they are missing, so that run, reference and scores of a recipe use the same tokenizer;
    with ``image_tokens: false`` it is that of a model's processor, which has tokens of its own. By ``chat_template`` it
    writes conversations, see :func:`.use_template`; without the key it writes none.
    """
    whole = config.get("image_tokens", True)
    key = "tokenizer.name" + ("" if whole else " (by default model.pretrained or model.processor.name)")
    name = f"{key}={config['name']!r}"
    try:
        loaded = load_pretrained(AutoTokenizer if whole else AutoProcessor, config["name"], **config.get("kwargs", {}))
        tokenizer = getattr(loaded, "tokenizer", loaded)  # as the processor has set it: PaliGemma's adds bos itself
    except ModelFolderError as error:
        raise ModelFolderError(f"{key}={error}") from error
    except (OSError, ValueError) as error:
        if whole and isinstance(error, OSError):
            raise OSError(f"{name} is no folder with a tokenizer: {one_line(error)}") from error
        if whole or not str(error).startswith(("Unrecognized", "Can't load")):
            raise
        raise ValueError(
            f"{name} holds no processor of images and text: the tokenizer is that of the processor, so leave "
            "tokenizer.name out; model.pretrained or model.processor.name names the processor."
        ) from error
    if not tokenizer.is_fast:
        raise ValueError(f"{name} has no fast version, which knows a token's characters.")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{name} has no end-of-sequence token: set tokenizer.kwargs.eos_token.")
    if whole:
        add_image_tokens(tokenizer)
    tokenizer.chat_template = tokenizer.chat_template or getattr(loaded, "chat_template", None)
    if config.get("chat_template") is not None and not placeholder(tokenizer):
        raise ValueError(f"tokenizer.chat_template: it is not known how a {type(loaded).__name__} names images.")
    use_template(tokenizer, config.get("chat_template"), placeholder(tokenizer))
    return tokenizer


def train_tokenizer(captions: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on captions; the vocabulary includes the image tokens and the 256 bytes."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(captions, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=[IMAGE_TOKEN, ROW_TOKEN],
    )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of the vocabulary, the merges and the special tokens, which decide how text becomes ids."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    backend.pop("padding", None)
    backend.pop("truncation", None)
    # transformers 5 keeps the additional ones apart from the map of named ones.
    further = getattr(tokenizer, "additional_special_tokens", tokenizer.extra_special_tokens)
    special = {**tokenizer.special_tokens_map, **({"additional_special_tokens": further} if further else {})}
    text = json.dumps([backend, special], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def add_image_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Add the image and row-separator tokens to a tokenizer that lacks them, and return their ids.

    Ordinary tokens of these names become special ones, so that captions are not encoded as them.
    """
    missing = _missing_image_tokens(tokenizer)
    if missing:  # False: beside the special tokens that there are; transformers 4 and 5 name the argument differently
        known = tokenizer.get_vocab()
        tokenizer.add_special_tokens({"additional_special_tokens": missing}, False)
        new = [id for token, id in tokenizer.get_vocab().items() if token not in known]
        tokenizer.added_image_token_ids = new  # type: ignore[attr-defined]  # for a model that has not learned them
    return image_token_ids(tokenizer)


def image_token_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Return the ids of the image and row-separator tokens, or raise ValueError if the tokenizer lacks them."""
    missing = _missing_image_tokens(tokenizer)
    if missing:
        raise ValueError(
            f"The tokenizer lacks {' and '.join(missing)}: call composer_prior.data.tokenizer.add_image_tokens on it "
            "before the model and its data are made."
        )
    return tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), tokenizer.convert_tokens_to_ids(ROW_TOKEN)


def reserved_ids(tokenizer: PreTrainedTokenizerBase, further: Collection[str] = ()) -> set[int]:
    """Return the ids that no caption may contain, as it can where they are words of the vocabulary.

    Args:
        tokenizer: of the model.
        further: tokens by which the model's processor knows an image. Default: none beside ours.
    """
    special = [id for id, token in tokenizer.added_tokens_decoder.items() if token.special]
    of_images = special if _missing_image_tokens(tokenizer) else image_token_ids(tokenizer)
    theirs = map(tokenizer.convert_tokens_to_ids, further)
    return {*of_images, *theirs, bos_id(tokenizer), tokenizer.eos_token_id} - {tokenizer.unk_token_id}


def has_image_tokens(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return True if a tokenizer has the image and row-separator tokens."""
    return not _missing_image_tokens(tokenizer)


def _missing_image_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return [token for token in (IMAGE_TOKEN, ROW_TOKEN) if token not in special]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, further: Collection[str] = ()) -> list[int]:
    """Return the tokens of the text between image and caption; it may spell any special token but those of images.

    Args:
        tokenizer: of the model.
        prompt: the text.
        further: tokens by which the model's processor knows an image. Default: none beside ours.
    """
    ids: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    read = tokenizer.convert_ids_to_tokens(ids)
    for token in (IMAGE_TOKEN, ROW_TOKEN, *further):
        if token in prompt or token in read:
            raise ValueError(
                f"prompt={prompt!r} spells {token}: the image stands before the prompt; leave {token} out."
            )
    return ids


def placeholder(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text in whose place a processor with this tokenizer puts an image; "" if no token is known for one."""
    known = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return whole_placeholder(next((token for token in _PLACEHOLDERS if token in known), ""))


def whole_placeholder(token: str) -> str:
    """Return the text that stands for an image whose token is given, with the tokens around it that Qwen needs."""
    return "".join(_QWEN) if token == _QWEN[1] else token


def bos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that starts every sequence: beginning of sequence, or else end of sequence."""
    token_id = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if token_id is None:
        raise ValueError("The tokenizer has neither a beginning- nor an end-of-sequence token; set its eos_token.")
    return token_id


def encode_caption(tokenizer: PreTrainedTokenizerBase, caption: str) -> Encoding:
    """Encode a caption as tokens and offsets, without special tokens unless they are words of the vocabulary.

    The result is that of ``tokenizer(caption, add_special_tokens=False, split_special_tokens=True)``, in a fifth of the
    time.
    """
    backend = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    return backend.encode(caption, add_special_tokens=False)


@dataclass(frozen=True)
class CaptionFormat:
    """The format of a caption's tokens: beginning of sequence, prompt, caption, end of sequence."""

    tokenizer: PreTrainedTokenizerBase  # a fast one
    prompt: str = ""  # text between image and caption
    max_caption_tokens: int = 128  # a longer caption is cut there, and then has no end-of-sequence token

    def prefix_ids(self, tokenizer: PreTrainedTokenizerBase | None = None) -> list[int]:
        """Return the ids before the caption without the image, of another tokenizer if one is given."""
        tokenizer = tokenizer or self.tokenizer
        return [bos_id(tokenizer), *prompt_ids(tokenizer, self.prompt)]
