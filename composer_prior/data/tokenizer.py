"""Tokenizers: a byte-level BPE trained on captions, fingerprints."""

import hashlib
import json
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from composer_prior.models.language import IMAGE_TOKEN, ROW_TOKEN

SPECIAL_TOKENS = ["<pad>", "<bos>", "<eos>", IMAGE_TOKEN, ROW_TOKEN]


def train_tokenizer(captions: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in Hugging Face form, with the image tokens in its vocabulary.

    Args:
        captions: what to learn the merges from.
        vocab_size: number of tokens, special tokens and the 256 bytes included.
    """
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
    """Digest of the vocabulary, the merges and the special tokens: what decides how text becomes ids."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    backend.pop("padding", None)
    backend.pop("truncation", None)
    text = json.dumps([backend, tokenizer.special_tokens_map], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
