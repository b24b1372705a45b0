"""Compare a GPU with the CPU: ``python tools/check_cuda.py``, or ``device=cpu`` to test the check itself.

The check runs small models of random weights, and the recipe at real scale with small overrides, on the embedded
captions, without downloads. It prints a table of differences and tolerances; the exit status is 1 if a difference
exceeds its tolerance. It needs the extras ``emoji`` and, for the kernel of the head, ``cuda``.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from composer.core import Precision, get_precision_context
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from composer_prior import ComposerLVLM, ReferenceLM
from composer_prior.algorithms.prior.weights import importance_weights
from composer_prior.data.batch import IGNORE_INDEX, CaptionCollator
from composer_prior.data.captions import decode_image
from composer_prior.data.tokenizer import bos_id, image_token_ids, train_tokenizer
from composer_prior.emoji_scenes.writing import make_emoji_scenes, make_sample
from composer_prior.models import head as head_module
from composer_prior.models.build import make_lvlm
from composer_prior.models.head import linear_nll
from composer_prior.models.vision import build_open_clip, build_patches

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from common.models import FAMILIES, small_lm  # noqa: E402 - of the tests
from common.recipes import LOADERS, SMALL_REAL_SCALE  # noqa: E402

RECIPE = ROOT / "yamls/prior_vit_l_14_336.yaml"
SIZES = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.1}
SAMPLES, STEPS = 12, 4
# Differences relative to the norm of the expected value: float32 in another order, and bf16's eight bits.
FLOAT32, BFLOAT16 = 1e-4, 3e-2
# Differences of losses, which accumulate over the steps of a run; in bf16 only the first loss is compared.
RUN_FLOAT32, RUN_BFLOAT16 = 1e-3, 5e-2


class Row(NamedTuple):
    """One comparison; ``difference`` is None if it did not run, for the reason in ``what``."""

    what: str
    difference: float | None
    tolerance: float

    @property
    def agrees(self) -> bool:
        """True if the difference is within the tolerance; False for NaN."""
        return self.difference is None or self.difference <= self.tolerance


def main(arguments: list[str]) -> int:
    """Compare and print; return 1 if a row differs or the device is missing."""
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    if len(given) != len(arguments) or not {*given} <= {"device"}:
        print("Usage: python tools/check_cuda.py [device=cuda|cpu]")
        return 1
    device = torch.device(given.get("device", "cuda"))
    if device.type == "cuda" and not torch.cuda.is_available():
        print("No GPU is available; device=cpu tests the check itself, not a GPU.")
        return 1
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU: this does not test a GPU"
    print(f"torch {torch.__version__}, {name}, against the CPU")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    tokenizer = train_tokenizer((make_sample("train", i)["caption"] for i in range(100)), 400)
    rows = []
    for row in chain(weights(tokenizer, device), heads(device), models(tokenizer, device), runs(tokenizer, device)):
        rows.append(row)
        print(line(row), flush=True)
    differing = [row.what for row in rows if not row.agrees]
    print(f"{len(differing)} of {len(rows)} differ: {'; '.join(differing)}" if differing else "All agree.")
    return int(bool(differing))


def line(row: Row) -> str:
    """Format a row of the table."""
    if row.difference is None:
        return f"not run  {row.what}"
    return f"{'agrees ' if row.agrees else 'DIFFERS'}  {row.difference:8.1e} of {row.tolerance:.0e}  {row.what}"


def difference(ours: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference relative to the norm of the expected value."""
    ours, expected = ours.detach().cpu().double(), expected.detach().cpu().double()
    return float((ours - expected).norm() / expected.norm().clamp(min=1e-30))


def weights(tokenizer: PreTrainedTokenizerFast, device: torch.device) -> Iterator[Row]:
    """Compare reference log-probabilities, and PRIOR's weights computed from them."""
    model = small_model("encoder", tokenizer)
    batch = make_batch(model, tokenizer)
    expected = reference_logprobs(model, tokenizer, batch)
    found = reference_logprobs(model, tokenizer, to(batch, device))
    yield Row("log-probabilities of the reference, float32", difference(found, expected), FLOAT32)
    mask = batch["labels"] != IGNORE_INDEX
    for normalization in ("sequence", "batch", "none"):
        options: Any = {"alpha": 1.5, "normalization": normalization, "floor": 0.1}
        ours = importance_weights(expected.to(device), mask.to(device), **options)
        theirs = importance_weights(expected, mask, **options)
        yield Row(f"weights, normalization={normalization}", difference(ours, theirs), FLOAT32)


def heads(device: torch.device) -> Iterator[Row]:
    """Compare losses and gradients of the head, in blocks and by cut-cross-entropy, with float64 on the CPU."""
    torch.manual_seed(0)
    tokens, width, vocabulary = 128, 64, 8000
    hidden, matrix = torch.randn(tokens, width), torch.randn(vocabulary, width) * width**-0.5
    targets = torch.randint(vocabulary, (tokens,))
    kernel = head_module.linear_cross_entropy
    for dtype, tolerance in ((torch.float32, FLOAT32), (torch.bfloat16, BFLOAT16)):
        rounded = [tensor.to(dtype) for tensor in (hidden, matrix)]
        expected = nll_and_gradients(*(tensor.double() for tensor in rounded), targets, dense)
        with (
            patch.object(head_module, "linear_cross_entropy", None),
            patch.dict(head_module.BLOCK_ELEMENTS, {device.type: 2**17}),  # several blocks,
            patch.dict(head_module.KEPT_ELEMENTS, {device.type: 2**18}),  # some of them recomputed
        ):
            found = nll_and_gradients(*(x.to(device) for x in rounded), targets.to(device), by_head)
        yield from compared(f"head in blocks, {str(dtype)[6:]}", found, expected, tolerance)
    if kernel is None or device.type != "cuda":
        why = "install the extra `cuda`" if device.type == "cuda" else "it needs a GPU"
        yield Row(f"head by cut-cross-entropy, bfloat16: {why}", None, BFLOAT16)
        return
    found = nll_and_gradients(*(x.to(device) for x in rounded), targets.to(device), by_head)
    yield from compared("head by cut-cross-entropy, bfloat16", found, expected, BFLOAT16)


def nll_and_gradients(
    hidden: Tensor, matrix: Tensor, targets: Tensor, nll: Callable[[Tensor, nn.Linear, Tensor], Tensor]
) -> dict[str, Tensor]:
    """Return the losses of tokens and the gradients of a weighted mean of them."""
    hidden = hidden.clone().requires_grad_()
    head = nn.Linear(*matrix.T.shape, bias=False, device=matrix.device, dtype=matrix.dtype)
    head.weight.data = matrix.clone()
    losses = nll(hidden, head, targets)
    (losses * torch.linspace(0, 2, len(losses), device=losses.device)).mean().backward()
    gradients = {"gradient of the hidden states": hidden.grad, "gradient of the head": head.weight.grad}
    return {"losses": losses, **{name: value for name, value in gradients.items() if value is not None}}


def by_head(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """Return losses computed by the head of the package."""
    return linear_nll(hidden, head, targets)[0]


def dense(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """Return losses computed from all logits."""
    return nn.functional.cross_entropy(head(hidden), targets, reduction="none")


def compared(what: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float) -> Iterator[Row]:
    """Yield a row for each expected value."""
    for name, value in expected.items():
        yield Row(f"{what}: {name}", difference(found[name], value), tolerance)


def models(tokenizer: PreTrainedTokenizerFast, device: torch.device) -> Iterator[Row]:
    """Compare token losses and gradients of PRIOR's loss for both families, padded and packed."""
    for family in FAMILIES:
        model = small_model(family, tokenizer)
        batch = make_batch(model, tokenizer)
        logprobs = reference_logprobs(model, tokenizer, batch)
        batch["token_weights"] = importance_weights(logprobs, batch["labels"] != IGNORE_INDEX)
        expected = losses_and_gradients(model, batch)
        for pack in (False, True):
            for precision, tolerance in ((Precision.FP32, FLOAT32), (Precision.AMP_BF16, BFLOAT16)):
                model = small_model(family, tokenizer, pack=pack).to(device)
                with get_precision_context(precision):
                    found = losses_and_gradients(model, to(batch, device))
                what = f"{family}{', packed' if pack else ''}, {precision.value}"
                yield from compared(what, found, expected, tolerance)


def losses_and_gradients(model: ComposerLVLM, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the losses of tokens and the gradients of PRIOR's loss."""
    outputs = model(batch)
    model.loss(outputs, batch).backward()
    gradients = [p.grad.flatten().float().cpu() for p in model.parameters() if p.grad is not None]
    return {"losses": outputs["nll"], "gradients of PRIOR's loss": torch.cat(gradients)}


def runs(tokenizer: PreTrainedTokenizerFast, device: torch.device) -> Iterator[Row]:
    """Compare runs of the recipe at real scale, made small by overrides, on one rank."""
    with tempfile.TemporaryDirectory(prefix="check_cuda_") as folder:
        make_emoji_scenes(
            folder + "/data", train_samples=16 * STEPS, validation_samples=8, canvas=48, num_workers=0, progress=False
        )
        small_lm(tokenizer, max_position_embeddings=512, **SIZES).save_pretrained(folder + "/pretrained")
        tokenizer.save_pretrained(folder + "/pretrained")
        expected = train(folder, "on_the_cpu", torch.device("cpu"), "fp32")
        found = train(folder, "in_float32", device, "fp32")
        furthest = max(abs(a - b) for a, b in zip(found, expected, strict=True))
        yield Row(f"losses of a run of {len(expected)} steps, fp32", furthest, RUN_FLOAT32)
        if device.type != "cuda":
            yield Row("first loss of a run, amp_bf16: it needs a GPU", None, RUN_BFLOAT16)
            return
        first = train(folder, "in_bfloat16", device, "amp_bf16")[0]
        yield Row("first loss of a run, amp_bf16", abs(first - expected[0]), RUN_BFLOAT16)


def train(folder: str, name: str, device: torch.device, precision: str) -> list[float]:
    """Run the recipe with a new reference and new scores, and return its losses."""
    hidden = {} if device.type == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "composer_prior", "train", str(RECIPE), *overrides(name, precision)]
    done = subprocess.run(command, cwd=folder, env={**os.environ, **hidden}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-3000:]}")
    lines = [json.loads(text) for text in Path(folder, "runs", name, "metrics.jsonl").read_text().splitlines()]
    return [step["loss/train/total"] for step in lines if "loss/train/total" in step]


def overrides(name: str, precision: str) -> list[str]:
    """Return overrides that make the recipe small, in a folder with data and language model."""
    data = {"train": "data/train", "eval": "data/validation"}
    return [
        *SMALL_REAL_SCALE,
        f"run_name={name}",
        f"reference.run_name=reference_{name}",
        f"max_duration={STEPS}ba",
        f"reference.max_duration={STEPS}ba",
        "scheduler.t_warmup=1ba",
        *(f"{prefix}parallelism_config=null" for prefix in ("", "reference.")),
        *(f"{prefix}precision={precision}" for prefix in ("", "reference.")),
        *(f"{loader}.dataset.remote=null" for loader in LOADERS),
        *(f"{loader}.dataset.cache_limit=null" for loader in LOADERS if "train" in loader),
        *(f"{loader}.dataset.local={data[loader.split('.')[-1].removesuffix('_loader')]}" for loader in LOADERS),
        f"train_loader.dataset.scores=scores_{name}",
    ]


def make_batch(model: ComposerLVLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, Tensor]:
    """Make a batch of captions of very different lengths, some of a single label."""
    samples = []
    for index in range(SAMPLES):
        sample = make_sample("train", index, canvas=48)
        image = model.image_processor(decode_image(sample["image"]))
        caption = (tokenizer(sample["caption"])["input_ids"] * (1 + index % 3))[: [50, 1, 20][index % 3]]
        prefix = [bos_id(tokenizer), *(image_token_ids(model.tokenizer)[kind] for kind in image.layout)]
        samples.append(
            {
                "input_ids": torch.tensor(prefix + caption),
                "labels": torch.tensor([IGNORE_INDEX] * len(prefix) + caption),
                "sample_id": index,
                **image.tensors,
            }
        )
    return CaptionCollator(tokenizer.pad_token_id)(samples)


def to(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Move a batch to a device."""
    return {key: value.to(device) for key, value in batch.items()}


def reference_logprobs(model: ComposerLVLM, tokenizer: PreTrainedTokenizerFast, batch: Mapping[str, Tensor]) -> Tensor:
    """Score a batch with a reference of sharp predictions, so that weights are far from equal."""
    lm = small_lm(tokenizer, seed=1, **SIZES).to(batch["labels"].device)
    with torch.no_grad():
        lm.lm_head.weight.mul_(5)
    text = (batch[key] for key in ("input_ids", "attention_mask", "labels"))
    return ReferenceLM(lm, tokenizer).logprobs(*text, drop_token_ids=image_token_ids(model.tokenizer))


def small_model(family: str, tokenizer: PreTrainedTokenizerFast, pack: bool = False) -> ComposerLVLM:
    """Build a model of either family with the same weights each time."""
    lm = small_lm(tokenizer, **SIZES)
    if family == "encoder":
        tower: nn.Module = build_open_clip("prior-vit-tiny", image_size=48)
    else:
        tower = build_patches(lm.config.hidden_size, patch_size=16, max_side=48)
    parts = make_lvlm(lm, tower, "mlp" if family == "encoder" else None, tokenizer)
    return ComposerLVLM(*parts, pack=pack)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
