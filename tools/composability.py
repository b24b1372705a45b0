"""Run a method with every algorithm of Composer, and write the table into PRIOR's method card.

    python tools/composability.py prior            # print the table and write it into the card
    python tools/composability.py rho1 --check     # compare the table of a method, or of PRIOR, with the card

Each algorithm trains a few steps before and after the method in the list, on a small model of both families. "works":
in every microbatch the loss equals the formula, computed here in float64 from the batch and the model that the other
algorithm leaves. "refused": training did not start, and one line said why. Any other result is an error.
"""

import argparse
import atexit
import functools
import logging
import os
import re
import shutil
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import composer.algorithms as algorithms
import numpy as np
import torch
from composer import Trainer
from composer.core import Algorithm, Callback, State, get_precision_context
from composer.utils import reproducibility
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from composer_prior import PRIOR, ComposerLVLM, ReferenceLM, StreamingCaptionDataset, selective_backprop_keys
from composer_prior.algorithms.cal.cal import CAL
from composer_prior.algorithms.dpa.dpa import DPA
from composer_prior.algorithms.focal.focal import Focal
from composer_prior.algorithms.image_gain.image_gain import ImageGain
from composer_prior.algorithms.oracle.oracle import Oracle
from composer_prior.algorithms.permuted_prior.permuted_prior import PermutedPRIOR
from composer_prior.algorithms.random_prior.random_prior import RandomPRIOR
from composer_prior.algorithms.regate.regate import ReGATE
from composer_prior.algorithms.rho1.rho1 import Rho1
from composer_prior.algorithms.vig.vig import VIG
from composer_prior.data.batch import IGNORE_INDEX
from composer_prior.data.captions import caption_data_spec
from composer_prior.data.tokenizer import image_token_ids, train_tokenizer
from composer_prior.emoji_scenes.writing import make_emoji_scenes, make_sample
from composer_prior.models.build import make_lvlm
from composer_prior.models.image_text_model import ImageTextModel
from composer_prior.models.vision import build_open_clip, build_patches

CARD = Path(__file__).parents[1] / "composer_prior/algorithms/prior/README.md"
BEGIN, END = "<!-- composability: begin (python tools/composability.py prior) -->", "<!-- composability: end -->"
FAMILIES = ("encoder", "patches")
ORDERS = ("before", "after")
IMAGE_INPUTS = ("pixel_values", "pixel_patches", "patch_mask", "image_grid")
ALPHA, FLOOR, SHARE, GAMMA, SEED, GAIN = 1.5, 0.1, 0.6, 2.0, 3, -3.2
TOLERANCE = 1e-5
# Algorithms that only replace modules: without such a module they change nothing.
SURGERY = (
    "BlurPool",
    "ChannelsLast",
    "Factorize",
    "GhostBatchNorm",
    "LowPrecisionGroupNorm",
    "LowPrecisionLayerNorm",
    "SqueezeExcite",
    "StochasticDepth",
    "WeightStandardization",
)


@dataclass(frozen=True)
class Case:
    """An algorithm as a user would write it, and the model settings that it needs."""

    name: str
    build: Callable[[ComposerLVLM], list[Algorithm]] = lambda model: []
    remark: str = ""
    model: Mapping[str, Any] | None = None


def cases() -> list[Case]:
    """List every algorithm of ``composer.algorithms``, some with several settings."""
    a = algorithms
    pixels: Any = {"input_key": "pixel_values", "target_key": "labels"}
    swa: Any = {"swa_start": "0.3dur", "swa_end": "0.9dur", "update_interval": "1ba"}
    narrow: Any = {"min_features": 16, "latent_features": 4}
    keys = "`**selective_backprop_keys(model)`"
    images = "on the images of the data set"
    return [
        Case("Alibi", lambda m: [a.Alibi(max_sequence_length=256)]),
        Case("AugMix", lambda m: [a.AugMix()], images),
        Case("BlurPool", lambda m: [a.BlurPool()]),
        Case("ChannelsLast", lambda m: [a.ChannelsLast()]),
        Case("ColOut", lambda m: [a.ColOut(batch=True, **pixels)]),
        Case("ColOut", lambda m: [a.ColOut(batch=False)], f"`batch=False`, {images}"),
        Case("CutMix", lambda m: [a.CutMix(**pixels)]),
        Case("CutOut", lambda m: [a.CutOut(input_key="pixel_values")], "`input_key='pixel_values'`"),
        Case("EMA", lambda m: [a.EMA(half_life="1ba", update_interval="1ba")]),
        Case("Factorize", lambda m: [a.Factorize(**narrow)]),
        Case("Factorize", lambda m: [a.Factorize(factorize_linears=False)], "`factorize_linears=False`"),
        Case("GatedLinearUnits", lambda m: [a.GatedLinearUnits()]),
        Case("GhostBatchNorm", lambda m: [a.GhostBatchNorm()]),
        Case("GradientClipping", lambda m: [a.GradientClipping(clipping_type="norm", clipping_threshold=0.1)]),
        Case("GyroDropout", lambda m: [a.GyroDropout()]),
        Case("LabelSmoothing", lambda m: [a.LabelSmoothing(target_key="labels")]),
        Case("LabelSmoothing", model={"label_smoothing": 0.1}, remark="as `ComposerLVLM(..., label_smoothing=0.1)`"),
        Case("LayerFreezing", lambda m: [a.LayerFreezing(freeze_start=0.0, freeze_level=0.9)]),
        Case("LowPrecisionGroupNorm", lambda m: [a.LowPrecisionGroupNorm()]),
        Case(
            "LowPrecisionLayerNorm",
            lambda m: [a.LowPrecisionLayerNorm()],
            "in fp32; it acts with amp",
        ),
        Case("MixUp", lambda m: [a.MixUp(**pixels)]),
        Case("NoOpModel", lambda m: [a.NoOpModel()]),
        Case("ProgressiveResizing", lambda m: [a.ProgressiveResizing(**pixels)]),
        Case("RandAugment", lambda m: [a.RandAugment()], images),
        Case("SAM", lambda m: [a.SAM(rho=0.5)], "both passes of a step"),
        Case("SelectiveBackprop", lambda m: [selective_backprop(**selective_backprop_keys(m))], keys),
        Case("SelectiveBackprop", lambda m: [selective_backprop()]),
        Case("SeqLengthWarmup", lambda m: [a.SeqLengthWarmup(min_seq_length=24, max_seq_length=64)]),
        Case("SqueezeExcite", lambda m: [a.SqueezeExcite(min_channels=1, latent_channels=4)]),
        Case("StochasticDepth", lambda m: [a.StochasticDepth("ResNetBottleneck")]),
        Case("SWA", lambda m: [a.SWA(**swa)]),
        Case("WeightStandardization", lambda m: [a.WeightStandardization()]),
    ]


def selective_backprop(**keys: Any) -> Algorithm:
    """Build SelectiveBackprop that drops half of each batch."""
    return algorithms.SelectiveBackprop(start=0.0, end=1.0, keep=0.5, interrupt=0, **keys)


@dataclass(frozen=True)
class Caption:
    """Inputs of a method for one caption of ``k`` tokens."""

    logp: Tensor  # [k] of its tokens under the model
    logits: Tensor  # [k] of its tokens under the model
    ref_logp: Tensor  # [k] under the reference
    viewer_logp: Tensor  # [k] under the viewer
    text_logits: Tensor  # [k] under the model's language model, the image taken out
    text_logp: Tensor  # [k] as log-probabilities
    image_related: Tensor  # [k] bool
    pool: list[float]  # PRIOR's weights of the whole batch
    sample: int
    step: int

    @property
    def noise(self) -> Any:
        """Random numbers of the caption, ``[k]``, determined by seed, step and sample."""
        counter = [0, 0, self.step, self.sample]
        return np.random.Generator(np.random.Philox(key=SEED, counter=counter)).random(len(self.logp))


@dataclass(frozen=True)
class Method:
    """A method as a user would write it, and a plain formula of its weights before normalization."""

    build: Callable[[ReferenceLM, ImageTextModel], Algorithm]
    weights: Callable[[Caption], Any]
    normalized: bool = True


def prior_by_hand(ref_logp: Tensor) -> Tensor:
    """Compute PRIOR's weights."""
    return FLOOR + (1 - FLOOR) * (1 - ref_logp.exp()) ** ALPHA


def gain_by_hand(caption: Caption) -> Tensor:
    """Compute ImageGain's weights."""
    seen, alone = caption.viewer_logp.exp(), caption.ref_logp.exp()
    return FLOOR + (1 - FLOOR) * (1 - alone / torch.maximum(alone, seen)) ** ALPHA


def permuted_by_hand(caption: Caption) -> list[float]:
    """Compute PRIOR's weights in a random order."""
    weights = prior_by_hand(caption.ref_logp).tolist()
    return [weights[place] for place in sorted(range(len(weights)), key=lambda i: caption.noise[i])]


def drawn_by_hand(caption: Caption) -> list[float]:
    """Draw weights from those of PRIOR for the batch."""
    pool = sorted(caption.pool)
    return [pool[int(number * len(pool))] for number in caption.noise]


def selected_by_hand(caption: Caption) -> list[float]:
    """Compute Rho-1's selection of tokens."""
    excess = (caption.ref_logp - caption.logp).tolist()
    kept = -(-len(excess) * 6 // 10)  # SHARE, rounded up
    chosen = set(sorted(range(len(excess)), key=lambda i: -excess[i])[:kept])
    return [float(i in chosen) for i in range(len(excess))]


def hardest_by_hand(caption: Caption) -> list[float]:
    """Compute ReGATE's selection of tokens on the caption's first visit."""
    scores = (-caption.logp - 0.5 * caption.ref_logp).tolist()
    chosen = set(sorted(range(len(scores)), key=lambda i: -scores[i])[: -(-len(scores) // 2)])
    return [float(i in chosen) for i in range(len(scores))]


def explained_by_hand(caption: Caption) -> list[float]:
    """Compute VIG's selection of captions and tokens by a threshold."""
    gains = (caption.viewer_logp - caption.ref_logp).tolist()
    return [float(gain >= GAIN and sum(gains) / len(gains) >= GAIN) for gain in gains]


def contrast_by_hand(caption: Caption) -> list[float]:
    """Compute CAL's clamped and smoothed contrast of logits."""
    clamped = [min(max(x, 1.0), 5.0) for x in (caption.logits - caption.text_logits).tolist()]
    parts = [clamped[max(0, i - 1) : i + 2] for i in range(len(clamped))]
    return [sum(part) / len(part) for part in parts]


def added_by_hand(caption: Caption) -> list[float]:
    """Compute DPA's smoothed probability that the image adds."""
    added = [min(max(x, 0.0), 1.0) for x in (caption.logp.exp() - caption.text_logp.exp()).tolist()]
    parts = [added[max(0, i - 1) : i + 2] for i in range(len(added))]
    return [sum(part) / len(part) for part in parts]


METHODS = {
    "prior": Method(lambda r, v: PRIOR(r, alpha=ALPHA, floor=FLOOR), lambda c: prior_by_hand(c.ref_logp)),
    "permuted_prior": Method(lambda r, v: PermutedPRIOR(r, alpha=ALPHA, floor=FLOOR, seed=SEED), permuted_by_hand),
    "random_prior": Method(lambda r, v: RandomPRIOR(r, alpha=ALPHA, floor=FLOOR, seed=SEED), drawn_by_hand),
    "oracle": Method(lambda r, v: Oracle(FLOOR), lambda c: torch.where(c.image_related, 1.0, FLOOR)),
    "rho1": Method(lambda r, v: Rho1(r, share=SHARE), selected_by_hand),
    "cal": Method(lambda r, v: CAL(), contrast_by_hand),
    "dpa": Method(lambda r, v: DPA(), added_by_hand),
    "focal": Method(lambda r, v: Focal(GAMMA), lambda c: (1 - c.logp.exp()) ** GAMMA, normalized=False),
    "vig": Method(lambda r, v: VIG(v, r, threshold=GAIN, normalization="none"), explained_by_hand, normalized=False),
    "regate": Method(lambda r, v: ReGATE(r, decay=0.0, dense=0, start="0ba"), hardest_by_hand),
    "image_gain": Method(lambda r, v: ImageGain(v, r, alpha=ALPHA, floor=FLOOR), gain_by_hand),
}


class Check(Callback):
    """Compute the expected loss of every microbatch."""

    def __init__(self, method: Method, reference: ReferenceLM, viewer: ComposerLVLM):
        self.method = method
        self.reference = reference
        self.viewer = viewer
        self.forwards = 0
        self.losses: list[tuple[float, float]] = []  # (Composer's, by hand)

    def batch_start(self, state: State, logger: Any) -> None:
        """Keep the whole batch."""
        self.whole = dict(state.batch)

    def before_forward(self, state: State, logger: Any) -> None:
        """Keep a copy of the microbatch."""
        self.forwards += 1
        self.batch = {key: value.clone() for key, value in state.batch.items()}

    def before_backward(self, state: State, logger: Any) -> None:
        """Record the loss and its expected value."""
        step = int(state.timestamp.batch)
        with torch.no_grad(), get_precision_context(state.precision, state.precision_config):
            texts = [text_logits(self.reference.model, state.model, self.whole, row) for row in rows(self.whole)]
            pool = [weight for logits, tokens in texts for weight in prior_by_hand(chosen(logits, tokens)).tolist()]
            expected = loss_by_hand(self.method, state.model, self.reference, self.viewer, self.batch, pool, step)
        self.losses.append((float(cast(Tensor, state.loss)), expected))


def image_logits(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Compute all logits of a model beside the images, ``[B, T, V]`` float64."""
    lvlm = model.model
    embeddings = lvlm.causal_lm.get_input_embeddings()(batch["input_ids"])
    images = {key: batch[key] for key in IMAGE_INPUTS if key in batch}
    features = lvlm.model.multi_modal_projector(lvlm.model.vision_tower(**images))
    embeddings[batch["input_ids"] == lvlm.config.image_token_id] = features.to(embeddings.dtype)
    return lvlm.causal_lm(inputs_embeds=embeddings).logits.double()


def loss_by_hand(
    method: Method,
    model: Any,
    reference: ReferenceLM,
    viewer: Any,
    batch: Mapping[str, Tensor],
    pool: list[float],
    step: int,
) -> float:
    """Compute the loss of a method from all logits, row by row."""
    all_logits, seen_logits = image_logits(model, batch), image_logits(viewer, batch)
    smoothing = model.label_smoothing
    total, count = 0.0, 0
    for row in rows(batch):
        places = (batch["labels"][row] != IGNORE_INDEX).nonzero()[:, 0]
        tokens = batch["labels"][row][places]
        logits = all_logits[row, places - 1]
        logp = chosen(logits, tokens)
        before = logits.log_softmax(-1)
        text, _ = text_logits(model.model.causal_lm, model, batch, row)
        caption = Caption(
            logp,
            logits.gather(1, tokens[:, None])[:, 0],
            chosen(*text_logits(reference.model, model, batch, row)),
            chosen(seen_logits[row, places - 1], tokens),
            text.gather(1, tokens[:, None])[:, 0],
            chosen(text, tokens),
            batch["image_related"][row][places],
            pool,
            int(batch["sample_id"][row]),
            step,
        )
        weights = torch.as_tensor(method.weights(caption), dtype=torch.float64)
        if method.normalized:
            weights = weights * len(places) / weights.sum() if weights.sum() > 0 else torch.ones_like(weights)
        nll = -(1 - smoothing) * logp - smoothing * before.mean(-1)
        total, count = total + float((weights * nll).sum()), count + len(places)
    return total / count


def rows(batch: Mapping[str, Tensor]) -> range:
    """Return the row numbers of a batch."""
    return range(len(batch["labels"]))


def chosen(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the log-probabilities of tokens."""
    return logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]


def text_logits(lm: Any, model: Any, batch: Mapping[str, Tensor], row: int) -> tuple[Tensor, Tensor]:
    """Return logits ``[k, V]`` before the tokens of one caption, and the tokens, without the image."""
    is_text = batch["attention_mask"][row].bool()
    for token_id in image_token_ids(model.tokenizer):
        is_text &= batch["input_ids"][row] != token_id
    text, labels = batch["input_ids"][row][is_text], batch["labels"][row][is_text]
    places = (labels != IGNORE_INDEX).nonzero()[:, 0]
    return lm(text[None]).logits[0].double()[places - 1], labels[places]


@functools.cache
def prepared() -> tuple[PreTrainedTokenizerFast, StreamingCaptionDataset]:
    """Make a tokenizer and a small data set."""
    tokenizer = train_tokenizer((make_sample("train", i)["caption"] for i in range(100)), 400)
    folder = Path(tempfile.mkdtemp(prefix="composability_"))
    atexit.register(shutil.rmtree, folder)
    make_emoji_scenes(folder / "data", train_samples=8, validation_samples=1, num_workers=0, progress=False)
    local = str(folder / "data" / "train")
    data = StreamingCaptionDataset(tokenizer=tokenizer, batch_size=4, local=local, max_caption_tokens=32)
    return tokenizer, data


def small_lm(seed: int) -> LlamaForCausalLM:
    """Build a small language model of random weights."""
    tokenizer, _ = prepared()
    reproducibility.seed_all(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.2, **sizes, **ids))


@functools.cache
def reference_lm() -> LlamaForCausalLM:
    """Train a small language model on the captions, so that weights are far from equal."""
    tokenizer, _ = prepared()
    lm = small_lm(seed=1)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-2)
    for start in range(0, 400, 8):
        captions = [make_sample("train", i % 100)["caption"] for i in range(start, start + 8)]
        ids = tokenizer(captions, padding=True, return_tensors="pt")["input_ids"]
        lm(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return lm


def small_model(family: str, seed: int = 0, **settings: Any) -> ComposerLVLM:
    """Build a small LVLM of a family."""
    tokenizer, _ = prepared()
    lm = small_lm(seed)
    if family == "encoder":
        tower: nn.Module = build_open_clip("prior-vit-tiny", image_size=24)
    else:
        tower = build_patches(32, patch_size=16, max_side=48)
    return ComposerLVLM(*make_lvlm(lm, tower, "mlp" if family == "encoder" else None, tokenizer), **settings)


def run(name: str, case: Case, family: str, order: str) -> str:
    """Return ``works``, ``works, changes nothing``, or ``refused: <reason>``.

    Raises:
        AssertionError: if a loss differs from the formula, or a refusal comes after training began.
    """
    tokenizer, dataset = prepared()
    method, model = METHODS[name], small_model(family, **(case.model or {}))
    reference = ReferenceLM(reference_lm(), tokenizer)
    dataset.image_processor, dataset.transform = model.image_processor, None
    viewer = small_model(family, seed=2)
    check = Check(method, reference, viewer.eval())
    before = structure(model)
    what = f"{case.name} on {family}, {order} {name}"
    try:
        ours = [method.build(reference, viewer.image_text_model)]
        other = case.build(model)
        trainer = Trainer(
            model=model,
            train_dataloader=caption_data_spec(dataset, 4),
            max_duration="2ep",
            optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
            algorithms=other + ours if order == "before" else ours + other,
            callbacks=[check],
            device_train_microbatch_size=3,
            accumulate_train_batch_on_tokens=True,
            progress_bar=False,
            device="cpu",
            seed=0,
        )
        trainer.fit()
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1].filename
        refused = any(
            part in Path(place).as_posix() for part in ("composer/algorithms/", "token_weighting/stacking.py")
        )
        if not refused or check.forwards > 0:
            raise AssertionError(f"{what}: fails, {error!r}") from error
        who, _, why = str(error).rpartition(f" does not stack with {type(ours[0]).__name__}: ")
        return f"refused: {'PRIOR' if who else 'Composer'}: {' '.join(why.split()).rstrip('.')}"
    assert len(check.losses) >= 4, f"{what}: {len(check.losses)} losses"
    for loss, expected in check.losses:
        assert abs(loss - expected) <= TOLERANCE * abs(expected), f"{what}: loss {loss}, by hand {expected}"
    unchanged = structure(model) == before
    return "works, changes nothing" if case.name in SURGERY and unchanged else "works"


def structure(model: nn.Module) -> list[Any]:
    """Return the types of modules and the memory format of weights, which surgery changes."""
    types = [type(module).__name__ for module in model.modules()]
    return [types, [p.stride() for p in model.parameters()]]


def table_lines(name: str) -> Iterator[str]:
    """Yield the lines of a method's table."""
    yield "| algorithm | encoder | patches | remark |"
    yield "| --- | --- | --- | --- |"
    for case in cases():
        yield table_row(case, {family: outcome(name, case, family) for family in FAMILIES})


def table_row(case: Case, results: Mapping[str, str]) -> str:
    """Format a row of the table from the results by family."""
    cells = [result.partition(": ")[0] for result in results.values()]
    reasons = dict.fromkeys(result.partition(": ")[2] for result in results.values())
    remarks = [text for text in (case.remark, *reasons) if text]
    return f"| {case.name} | {' | '.join(cells)} | {'; '.join(remarks)} |"


def outcome(name: str, case: Case, family: str) -> str:
    """Return the result of both orders, which must agree."""
    results = {run(name, case, family, order) for order in ORDERS}
    assert len(results) == 1, f"{case.name} on {family}: the order matters, {results}"
    return results.pop()


def main() -> None:
    """Print the table, and write it into the card or compare it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--check", action="store_true", help="compare with the card, do not write it")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    quiet()
    lines = []
    for line in table_lines(arguments.method):
        print(line, flush=True)
        lines.append(line)
    table = "\n".join([BEGIN, *lines, END])
    text = CARD.read_text()
    updated = re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: table, text, flags=re.S)
    if arguments.check and updated != text:
        raise SystemExit(f"{CARD} has a different table: run python tools/composability.py {arguments.method}")
    CARD.write_text(updated)


def quiet() -> None:
    """Silence warnings and logs."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


if __name__ == "__main__":
    main()
