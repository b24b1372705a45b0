"""The gradient of a step is the formula's, however the batch is cut: microbatches, ranks, shards."""

import math
from functools import cache
from itertools import combinations

import pytest
import torch
from common.models import FAMILIES, small_lvlm
from common.programs.one_step import (
    CASES,
    METHODS,
    NAMES,
    SEED,
    STREAMS,
    make_reference,
    make_samples,
    make_viewer,
    step_gradients,
)
from common.recipes import ROOT, fork_ranks
from common.training import figures_by_stream

from composer_prior import importance_weights
from composer_prior.algorithms.cal.weights import contrast_weights
from composer_prior.algorithms.dpa.weights import added_probability_weights
from composer_prior.algorithms.focal.weights import focal_weights
from composer_prior.algorithms.image_gain.weights import gain_weights
from composer_prior.algorithms.oracle.weights import oracle_weights
from composer_prior.algorithms.permuted_prior.weights import permuted
from composer_prior.algorithms.random_prior.weights import drawn
from composer_prior.algorithms.regate.weights import difficulty_weights
from composer_prior.algorithms.rho1.weights import selection_weights
from composer_prior.algorithms.token_weighting.noise import token_noise
from composer_prior.algorithms.token_weighting.normalize import normalize
from composer_prior.algorithms.vig.weights import vig_weights
from composer_prior.data.batch import IGNORE_INDEX, CaptionCollator
from composer_prior.data.tokenizer import image_token_ids
from composer_prior.models.viewer import Viewer

pytestmark = pytest.mark.slow

PROGRAM = ROOT / "tests/common/programs/one_step.py"
TOLERANCE = 1e-5


def relative_difference(ours, expected):
    assert ours.keys() == expected.keys()
    ours, expected = (torch.cat([g[name].double().flatten() for name in sorted(expected)]) for g in (ours, expected))
    return float((ours - expected).norm() / expected.norm())


def by_stream(batch, logprobs, seen, floor, alpha, normalization):
    """Weights with the settings of each stream, token by token in float64; ``seen`` is the viewer's, or None."""
    rows, plain = [], [NAMES[stream] in STREAMS and STREAMS[NAMES[stream]] is None for stream in batch["stream"]]
    for row, stream in enumerate(batch["stream"].tolist()):
        own = {"alpha": alpha, "floor": floor, **(STREAMS.get(NAMES[stream]) or {})}
        rows.append([])
        for place, label in enumerate(batch["labels"][row].tolist()):
            p = math.exp(float(logprobs[row, place]))
            most = 1.0 if seen is None else max(p, math.exp(float(seen[row, place])))
            weight = own["floor"] + (1 - own["floor"]) * (1 - p / most) ** own["alpha"]
            rows[-1].append(0.0 if label == IGNORE_INDEX else 1.0 if plain[row] else weight)
    counts = (batch["labels"] != IGNORE_INDEX).sum(1).tolist()
    weighted = [row for row in range(len(rows)) if not plain[row]]
    sums = [sum(row) for row in rows]
    for row in weighted:
        among = weighted if normalization == "batch" else [row]
        scale = sum(counts[i] for i in among) / (sum(sums[i] for i in among) or 1.0)
        rows[row] = [weight * scale for weight in rows[row]]
    return torch.tensor(rows)


@cache
def formula_gradients(family, tokenizer, method):
    """The formula on the whole batch with plain autograd: no Composer, no microbatches, no algorithm."""
    model = small_lvlm(family, tokenizer)
    batch = CaptionCollator(tokenizer.pad_token_id)(make_samples(model, tokenizer))
    reference, image_ids = make_reference(tokenizer), image_token_ids(tokenizer)
    scores = reference.logprobs(batch["input_ids"], batch["attention_mask"], batch["labels"], image_ids)
    mask = batch["labels"] != IGNORE_INDEX
    model.label_logits = True
    outputs = model(batch)
    name, _, normalization = method.partition(", ")
    normalization = normalization or "sequence"
    raw, noise = importance_weights(scores, mask, 1.5, "none", 0.1), token_noise(batch["sample_id"], mask, SEED, 0)
    if name in ("prior by stream", "image_gain by stream"):
        seen = Viewer(make_viewer(family, tokenizer)).logprobs(batch) if "gain" in name else None
        weights = by_stream(batch, scores, seen, 0.1, 1.0 if "gain" in name else 1.5, normalization)
    elif name == "random_prior by stream":
        kept = mask & (batch["stream"] != NAMES.index("text"))[:, None]
        weights = torch.where(kept, normalize(drawn(raw[kept].sort().values, mask, noise), mask), mask.float())
    elif name == "prior":
        weights = importance_weights(scores, mask, 1.5, normalization, 0.1)
    elif name == "permuted_prior":
        weights = normalize(permuted(raw, mask, noise), mask, normalization)
    elif name == "random_prior":
        weights = normalize(drawn(raw[mask].sort().values, mask, noise), mask)
    elif name == "oracle":
        weights = normalize(oracle_weights(batch["image_related"], mask, 0.1), mask, normalization)
    elif name == "rho1":
        weights = normalize(selection_weights(outputs["nll"], scores, mask, 0.6), mask)
    elif name in ("cal", "dpa"):
        is_text = batch["attention_mask"].bool()
        for token_id in image_token_ids(tokenizer):
            is_text &= batch["input_ids"] != token_id
        alone = model.text_label_logits(batch["input_ids"], is_text, batch["labels"], name == "dpa")
        if name == "cal":
            weights = contrast_weights(outputs["label_logits"] - alone, mask, 0.1, 0.5)
        else:
            weights = added_probability_weights((-outputs["nll"].detach()).exp() - alone.exp(), mask)
    elif name.startswith("image_gain"):
        seen = Viewer(make_viewer(family, tokenizer)).logprobs(batch)
        alone = -outputs["nll"].detach() if "model" in name else scores
        weights = gain_weights(seen, alone, mask, normalization=normalization, floor=0.1)
    elif name == "vig":
        weights = vig_weights(Viewer(make_viewer(family, tokenizer)).logprobs(batch), scores, mask)
    elif name == "regate":
        weights = normalize(difficulty_weights(outputs["nll"], scores, mask), mask)
    else:
        weights = focal_weights(outputs["nll"], mask, 1.5)
    ((outputs["nll"] * weights).sum() / mask.sum()).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("microbatch", [None, 1, 3, 5])
@pytest.mark.parametrize(("family", "method"), CASES)
def test_microbatches(tokenizer, family, method, microbatch):
    ours = step_gradients(family, tokenizer, method, microbatch)
    assert relative_difference(ours, formula_gradients(family, tokenizer, method)) <= TOLERANCE


@cache
def expected_figures(family, tokenizer):
    """Figures by stream of the step of "prior by stream"."""
    model, reference = small_lvlm(family, tokenizer), make_reference(tokenizer)
    batch = CaptionCollator(tokenizer.pad_token_id)(make_samples(model, tokenizer))
    ids = batch["input_ids"], batch["attention_mask"], batch["labels"], image_token_ids(tokenizer)
    scores = reference.logprobs(*ids)
    with torch.no_grad():
        outputs = model(batch)
    return figures_by_stream(batch, outputs, NAMES, by_stream(batch, scores, None, 0.1, 1.5, "sequence"), scores)


@pytest.mark.parametrize("microbatch", [None, 1, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_figures_by_stream(tokenizer, family, microbatch):
    logged = {}
    step_gradients(family, tokenizer, "prior by stream", microbatch, logged=logged)
    expected = expected_figures(family, tokenizer)
    assert {name: logged[name] for name in expected} == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_figures_by_stream_of_two_ranks(tokenizer, two_ranks, family, strategy):
    """The first rank has no sample of one of the streams; the heaviest tenth is that of each rank."""
    expected = {name: v for name, v in expected_figures(family, tokenizer).items() if "top_decile" not in name}
    logged = two_ranks["logged"][strategy, family, "prior by stream"]
    assert {name: logged[name] for name in expected} == pytest.approx(expected, rel=TOLERANCE)


def test_the_methods_differ(tokenizer):
    """Or else the tests of their cuts would say little."""
    gradients = {method: formula_gradients("encoder", tokenizer, method) for method in METHODS}
    for one, other in combinations(METHODS, 2):
        assert relative_difference(gradients[one], gradients[other]) > 10 * TOLERANCE, (one, other)


@pytest.fixture(scope="module")
def two_ranks(tokenizer, tmp_path_factory):
    """Gradients of the same steps on two ranks, DDP and FSDP2 over gloo."""
    folder = tmp_path_factory.mktemp("two_ranks")
    tokenizer.save_pretrained(folder / "tokenizer")
    fork_ranks(None, PROGRAM, folder / "tokenizer", folder / "gradients.pt", "ddp|fsdp2", "|".join(METHODS))
    return torch.load(folder / "gradients.pt")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize(("family", "method"), CASES)
def test_two_ranks(tokenizer, two_ranks, strategy, family, method):
    ours = two_ranks[strategy, family, method]
    assert relative_difference(ours, formula_gradients(family, tokenizer, method)) <= TOLERANCE


def test_two_copies_of_two_shards(tokenizer, tmp_path):
    """HSDP: the gradients of four ranks are averaged among the shards of a copy, and between the copies."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    arguments = [tmp_path / "tokenizer", tmp_path / "gradients.pt", "hsdp", "prior, batch"]
    fork_ranks(None, PROGRAM, *arguments, ranks=4)
    gradients = torch.load(tmp_path / "gradients.pt")
    for family in FAMILIES:
        expected = formula_gradients(family, tokenizer, "prior, batch")
        assert relative_difference(gradients["hsdp", family, "prior, batch"], expected) <= TOLERANCE
