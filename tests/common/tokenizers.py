"""Small tokenizers of the forms that hubs' language models have; none knows the tokens of an image."""

import json
from collections.abc import Callable, Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

_GPT4_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def plain_tokenizer(kind: str, captions: Sequence[str], vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """A tokenizer of one of ``KINDS``, trained on captions, as it comes from a hub.

    Args:
        kind: ``gpt2``, ``llama2``, ``llama3``, ``qwen2`` or ``smollm2``.
        captions: what to learn the merges from.
        vocab_size: number of tokens, special tokens and 256 bytes included; fewer where the captions give out.
    """
    return _BUILDERS[kind](captions, vocab_size)


def _gpt2(captions: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """One special token for all, the last of the vocabulary; no padding token."""
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe = _byte_level(words, captions, vocab_size, after=["<|endoftext|>"])
    return _fast(bpe, bos_token="<|endoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>")


def _llama2(captions: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """SentencePiece's BPE: a space before every text, bytes for unknown characters, ``<s>`` put before; no padding."""
    special, as_bytes = ["<unk>", "<s>", "</s>"], [f"<0x{byte:02X}>" for byte in range(256)]
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    learned.train_from_iterator(
        captions,
        trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special + as_bytes, show_progress=False),
    )
    model = json.loads(learned.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    bpe = Tokenizer(models.BPE(model["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    bpe.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bpe.post_processor = _bos_before("<s>", 1)
    return _fast(bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _llama3(captions: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Put special tokens after the vocabulary and ``<|begin_of_text|>`` before every text; no padding token."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    bpe = _byte_level(_split(_GPT4_WORDS), captions, vocab_size, after=special)
    bos = _bos_before(special[0], bpe.token_to_id(special[0]))
    bpe.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), bos])
    return _fast(bpe, bos_token=special[0], eos_token=special[1])


def _qwen2(captions: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """No beginning-of-sequence token; special tokens after the vocabulary; text normalized to NFC."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = _split(_GPT4_WORDS.replace("{1,3}", ""))
    bpe = _byte_level(words, captions, vocab_size, after=special)
    bpe.normalizer = normalizers.NFC()
    return _fast(bpe, eos_token=special[0], pad_token=special[0], additional_special_tokens=special[1:])


def _smollm2(captions: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Put special tokens first and split digits."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<file_sep>"]
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe = _byte_level(pre_tokenizers.Sequence([digits, words]), captions, vocab_size, before=special)
    return _fast(
        bpe,
        bos_token=special[0],
        eos_token=special[0],
        unk_token=special[0],
        pad_token=special[2],
        additional_special_tokens=special[1:],
    )


_BUILDERS: dict[str, Callable[[Sequence[str], int], PreTrainedTokenizerFast]] = {
    "gpt2": _gpt2,
    "llama2": _llama2,
    "llama3": _llama3,
    "qwen2": _qwen2,
    "smollm2": _smollm2,
}
KINDS = tuple(_BUILDERS)


def _byte_level(
    words: pre_tokenizers.PreTokenizer,
    captions: Sequence[str],
    vocab_size: int,
    before: Sequence[str] = (),
    after: Sequence[str] = (),
) -> Tokenizer:
    """Train a byte-level BPE with special tokens before and after the learned ones."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = words
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(after),
        special_tokens=list(before),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(captions, trainer)
    bpe.add_special_tokens([AddedToken(token, normalized=False) for token in after])
    return bpe


def _split(words: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _bos_before(token: str, token_id: int) -> processors.PostProcessor:
    return processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, token_id)]
    )


def _fast(tokenizer: Tokenizer, **special: object) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)
