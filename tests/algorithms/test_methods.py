"""The weights of every method against a loop over tokens in float64, and what the methods refuse."""

import math
from types import SimpleNamespace

import pytest
import torch
from common.models import full_logits, small_lm, small_lvlm
from common.training import fit
from composer.core import Callback, Event, Timestamp
from composer.models import HuggingFaceModel
from hypothesis import given, settings
from hypothesis import strategies as st

from composer_prior import PRIOR, ComposerLVLM
from composer_prior.algorithms.cal.cal import CAL
from composer_prior.algorithms.cal.weights import contrast_weights
from composer_prior.algorithms.dpa.dpa import DPA
from composer_prior.algorithms.dpa.weights import added_probability_weights
from composer_prior.algorithms.focal.focal import Focal
from composer_prior.algorithms.focal.weights import focal_weights
from composer_prior.algorithms.oracle.oracle import Oracle
from composer_prior.algorithms.oracle.weights import oracle_weights
from composer_prior.algorithms.permuted_prior.permuted_prior import PermutedPRIOR
from composer_prior.algorithms.permuted_prior.weights import permuted
from composer_prior.algorithms.random_prior.random_prior import RandomPRIOR
from composer_prior.algorithms.random_prior.weights import drawn
from composer_prior.algorithms.regate.regate import ReGATE
from composer_prior.algorithms.regate.weights import averaged, difficulty_weights
from composer_prior.algorithms.rho1.rho1 import Rho1
from composer_prior.algorithms.rho1.weights import selection_weights
from composer_prior.algorithms.token_weighting.noise import token_noise
from composer_prior.algorithms.token_weighting.normalize import normalize
from composer_prior.algorithms.vig.vig import VIG
from composer_prior.algorithms.vig.weights import vig_weights
from composer_prior.data.batch import IGNORE_INDEX
from composer_prior.data.tokenizer import image_token_ids

WEIGHTINGS = (PRIOR, PermutedPRIOR, RandomPRIOR, Oracle, Rho1, ReGATE, CAL, DPA, Focal)


def made(method, reference):
    """A method as these tests use it, from the first step."""
    if method is ReGATE:
        return ReGATE(reference, dense=0, start="0ba")
    return method(reference) if issubclass(method, (PRIOR, Rho1)) else method()


def captions(*values):
    """Rows of equal length, of tokens that are masked or not and carry values."""
    token = st.tuples(st.booleans(), *values)
    rows = st.integers(1, 8).flatmap(
        lambda n: st.lists(st.lists(token, min_size=n, max_size=n), min_size=1, max_size=4)
    )
    return rows.map(
        lambda rows: [torch.tensor([[token[i] for token in row] for row in rows]) for i in range(len(values) + 1)]
    )


def normalized(raw, mask, normalization):
    """Lists of weights, those of a caption or of all summing to the number of its tokens."""
    total, count = sum(map(sum, raw)), int(mask.sum())
    rows = []
    for row, keep in zip(raw, mask.tolist(), strict=True):
        if normalization == "sequence":
            total, count = sum(row), sum(keep)
        scale = 1.0 if normalization == "none" else count / total if total > 0 else None
        rows.append([(1.0 if scale is None else w * scale) if m else 0.0 for w, m in zip(row, keep, strict=True)])
    return torch.tensor(rows, dtype=torch.float64)


def assert_equal(weights, raw, mask, normalization):
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.double(), normalized(raw, mask, normalization), rtol=1e-5, atol=1e-7)


NORMALIZATIONS = st.sampled_from(["sequence", "batch", "none"])


@settings(max_examples=100, deadline=None)
@given(captions(st.booleans()), st.sampled_from([0.0, 0.2]), NORMALIZATIONS)
def test_oracle(rows, floor, normalization):
    mask, related = rows
    raw = [
        [(1.0 if r else floor) if m else 0.0 for m, r in zip(*row, strict=True)]
        for row in zip(mask.tolist(), related.tolist(), strict=True)
    ]
    assert_equal(normalize(oracle_weights(related, mask, floor), mask, normalization), raw, mask, normalization)


@settings(max_examples=100, deadline=None)
@given(
    captions(st.floats(0, 20, width=32), st.floats(-20, 0, width=32)),
    st.sampled_from([0.1, 0.5, 0.6, 1.0]),
    NORMALIZATIONS,
)
def test_rho1(rows, share, normalization):
    mask, nll, ref_logprobs = rows
    raw = []
    for keep, ours, theirs in zip(mask.tolist(), nll, ref_logprobs, strict=True):
        excess = {i: float(ours[i] + theirs[i]) for i, m in enumerate(keep) if m}  # as the tensor holds it
        count = math.ceil(round(share * len(excess), 6))
        chosen = sorted(excess, key=lambda i: (-excess[i], i))[:count]
        raw.append([float(i in chosen) for i in range(len(keep))])
    weights = normalize(selection_weights(nll, ref_logprobs, mask, share), mask, normalization)
    assert_equal(weights, raw, mask, normalization)


@settings(max_examples=100, deadline=None)
@given(
    captions(st.floats(0, 20, width=32), st.floats(-20, 0, width=32)),
    st.sampled_from([0.1, 0.5, 0.6, 1.0]),
    st.sampled_from([0.0, 0.5, 2.0]),
    NORMALIZATIONS,
)
def test_regate(rows, share, reference_weight, normalization):
    mask, difficulty, ref_logprobs = rows
    raw = []
    for keep, ours, theirs in zip(mask.tolist(), difficulty, ref_logprobs, strict=True):
        scores = {i: float(ours[i] - reference_weight * theirs[i]) for i, m in enumerate(keep) if m}
        count = math.ceil(round(share * len(scores), 6))
        chosen = sorted(scores, key=lambda i: (-scores[i], i))[:count]
        raw.append([float(i in chosen) for i in range(len(keep))])
    weights = normalize(
        difficulty_weights(difficulty, ref_logprobs, mask, share, reference_weight), mask, normalization
    )
    assert_equal(weights, raw, mask, normalization)


@settings(max_examples=200, deadline=None)
@given(
    captions(st.integers(-20, 0).map(float), st.integers(-20, 0).map(float)),
    st.sampled_from([0.1, 0.5, 0.7, 1.0]),
    st.sampled_from([None, None, -1.0, 0.5]),
    st.sampled_from(["batch", "none"]),
)
def test_vig(rows, share, threshold, normalization):
    mask, viewer, reference = rows
    gains = [
        [v - r for m, v, r in zip(*row, strict=True) if m]
        for row in zip(mask.tolist(), viewer.tolist(), reference.tolist(), strict=True)
    ]
    means = [sum(row) / len(row) if row else None for row in gains]
    ranked = sorted((mean for mean in means if mean is not None), reverse=True)
    if threshold is None:
        least = ranked[math.ceil(round(share * len(ranked), 6)) - 1] if ranked else 0.0
    else:
        least = threshold
    raw = []
    for keep, row, mean in zip(mask.tolist(), gains, means, strict=True):
        rest = iter(row)
        raw.append([float(next(rest) >= least and mean >= least) if m else 0.0 for m in keep])
    weights = vig_weights(viewer, reference, mask, share, threshold, normalization)
    assert_equal(weights, raw, mask, normalization)


@pytest.mark.parametrize(("share", "kept"), [(0.7, 7), (0.71, 8), (1.0, 10), (0.01, 1)])
def test_vig_keeps_a_share_of_the_captions(share, kept):
    viewer = -torch.arange(1.0, 11.0)[:, None]
    weights = vig_weights(viewer, torch.full((10, 1), -20.0), torch.ones(10, 1, dtype=torch.bool), share)
    assert (weights > 0)[:, 0].tolist() == [i < kept for i in range(10)]


def test_vig_on_log_probabilities_of_minus_infinity():
    logprobs = torch.tensor([[-torch.inf, -1.0], [-torch.inf, -torch.inf]])
    weights = vig_weights(logprobs, torch.full((2, 2), -torch.inf), torch.ones(2, 2, dtype=torch.bool), 1.0)
    assert weights.tolist() == [[1.0, 1.0], [1.0, 1.0]]  # the threshold is 0


@settings(max_examples=100, deadline=None)
@given(captions(st.floats(-10, 10, width=32)), st.sampled_from([1, 3, 5]), NORMALIZATIONS)
def test_cal(rows, window, normalization):
    mask, difference = rows
    raw = []
    for keep, values in zip(mask.tolist(), difference.tolist(), strict=True):
        clamped = [min(max(x, 1.0), 5.0) for x in values]
        row = []
        for i, m in enumerate(keep):
            near = [j for j in range(max(0, i - window // 2), min(len(keep), i + window // 2 + 1)) if keep[j]]
            row.append(sum(clamped[j] for j in near) / len(near) if m else 0.0)
        raw.append(row)
    weights = contrast_weights(difference, mask, window=window, normalization=normalization)
    assert_equal(weights, raw, mask, normalization)


@settings(max_examples=100, deadline=None)
@given(captions(st.floats(-1, 1, width=32)), st.sampled_from([1, 3, 5]), NORMALIZATIONS)
def test_dpa(rows, window, normalization):
    mask, difference = rows
    raw = []
    for keep, values in zip(mask.tolist(), difference.tolist(), strict=True):
        kept = [min(max(x, 0.0), 1.0) for x in values]
        near = [[j for j in range(len(keep)) if abs(j - i) <= window // 2 and keep[j]] for i in range(len(keep))]
        raw.append([sum(kept[j] for j in js) / len(js) if m else 0.0 for m, js in zip(keep, near, strict=True)])
    weights = added_probability_weights(difference, mask, window, normalization)
    assert_equal(weights, raw, mask, normalization)


@settings(max_examples=100, deadline=None)
@given(captions(st.floats(2**-20, 30, width=32)), st.sampled_from([0.0, 0.5, 1.0, 2.0]), NORMALIZATIONS)
def test_focal(rows, gamma, normalization):
    mask, nll = rows
    raw = [
        [(-math.expm1(-x)) ** gamma if m else 0.0 for m, x in zip(*row, strict=True)]
        for row in zip(mask.tolist(), nll.tolist(), strict=True)
    ]
    assert_equal(normalize(focal_weights(nll, mask, gamma), mask, normalization), raw, mask, normalization)


def test_focal_is_the_focal_loss_with_its_gradient():
    p = torch.tensor([[0.9, 0.2, 0.5]], dtype=torch.float64, requires_grad=True)
    nll = -p.log()
    loss = (focal_weights(nll, torch.ones(1, 3, dtype=torch.bool)) * nll).sum()
    (gradient,) = torch.autograd.grad(loss, p)
    expected = [2 * (1 - x) * math.log(x) - (1 - x) ** 2 / x for x in p[0].tolist()]
    torch.testing.assert_close(gradient[0], torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0.0)
    certain = torch.zeros(1, 1, requires_grad=True)
    focal_weights(certain, torch.tensor([[True]]), gamma=0.5).sum().backward()
    assert certain.grad.isfinite().all()


@settings(max_examples=100, deadline=None)
@given(captions(st.floats(0, 4, width=32), st.floats(0, 1, width=32, exclude_max=True)))
def test_permutations(rows):
    mask, weights, noise = rows
    weights = torch.where(mask, weights, 0.0)
    expected = torch.zeros_like(weights)
    for row in range(len(mask)):
        places = mask[row].nonzero()[:, 0].tolist()
        order = sorted(places, key=lambda i: (float(noise[row, i]), i))
        for place, source in zip(places, order, strict=True):
            expected[row, place] = weights[row, source]
    moved = permuted(weights, mask, noise)
    assert torch.equal(moved, expected)
    assert torch.equal(moved.sort(1).values, weights.sort(1).values)


@settings(max_examples=100, deadline=None)
@given(
    captions(st.floats(0, 1, width=32, exclude_max=True)), st.lists(st.floats(0, 4, width=32), min_size=1, max_size=9)
)
def test_draws(rows, pool):
    mask, noise = rows
    pool = sorted(pool)
    expected = [
        [pool[int(x * len(pool))] if m else 0.0 for m, x in zip(*row, strict=True)]
        for row in zip(mask.tolist(), noise.tolist(), strict=True)
    ]
    assert torch.equal(drawn(torch.tensor(pool), mask, noise.double()), torch.tensor(expected))


def test_noise_belongs_to_sample_step_and_place_alone():
    ids = torch.tensor([7, 2**40, 3])
    mask = torch.tensor([[False, True, True, True], [True, True, False, False], [False, False, False, False]])
    noise = token_noise(ids, mask, seed=1, step=5)
    assert ((noise >= 0) & (noise < 1)).all()
    assert not noise[~mask].any()
    alone = token_noise(ids[:1], torch.tensor([[False, False, True, True, True, False]]), seed=1, step=5)
    assert torch.equal(
        alone[0, 2:5], noise[0, 1:4]
    )  # padding, an image of another size, other samples: nothing changes
    others = [token_noise(ids, mask, 2, 5), token_noise(ids, mask, 1, 6), token_noise(ids + 1, mask, 1, 5)]
    assert all((other != noise)[mask].all() for other in others)
    many = token_noise(torch.arange(2000), torch.ones(2000, 5, dtype=torch.bool), 0, 0)
    assert float(many.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(many.std()) == pytest.approx(12**-0.5, abs=0.01)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Oracle(floor=1.0), r"floor=1\.0: .* in \[0, 1\)"),
        (lambda: Rho1(share=0.0), r"share=0\.0: .* in \(0, 1\]"),
        (lambda: Rho1(share=1.5), r"share=1\.5"),
        (lambda: ReGATE(share=0.0), r"share=0\.0: .* in \(0, 1\]"),
        (lambda: ReGATE(decay=1.5), r"decay=1\.5.*: expected reference_weight >= 0"),
        (lambda: ReGATE(cycle=8), r"dense=16, cycle=8: expected .* 0 <= dense <= cycle"),
        (lambda: VIG(share=2.0), r"share=2\.0: .* in \(0, 1\]"),
        (lambda: VIG(normalization="sequence"), r"normalization='sequence': VIG leaves captions out"),
        (lambda: CAL(low=0.0), r"low=0\.0, high=5\.0: expected 0 < low <= high"),
        (lambda: CAL(window=2), r"window=2: expected an odd number"),
        (lambda: Focal(gamma=-1.0), r"gamma=-1\.0"),
        (lambda: Focal(gamma=math.nan), r"gamma=nan"),
        (lambda: PermutedPRIOR(alpha=-1.0), r"alpha=-1\.0"),
        (lambda: Oracle(normalization="row"), r"normalization='row'"),
    ],
)
def test_impossible_arguments_are_refused(build, message):
    with pytest.raises(ValueError, match=message) as error:
        build()
    assert "\n" not in str(error.value)


def without(spec, key):
    collate = spec.dataloader.collate_fn
    spec.dataloader.collate_fn = lambda samples: {k: v for k, v in collate(samples).items() if k != key}
    return spec


@pytest.mark.parametrize(
    ("method", "key", "message"),
    [
        (PermutedPRIOR, "sample_id", r"PermutedPRIOR needs `sample_id` \[B\] in the batch"),
        (RandomPRIOR, "sample_id", r"RandomPRIOR needs `sample_id` \[B\] in the batch"),
        (ReGATE, "sample_id", r"ReGATE needs `sample_id` \[B\] in the batch"),
        (Oracle, "image_related", r"Oracle needs `image_related` \[B, T\] in the batch"),
    ],
)
def test_a_batch_without_what_a_method_needs_is_refused(tokenizer, make_spec, reference, method, key, message):
    model = small_lvlm("patches", tokenizer)
    model.image_related_metrics = False
    with pytest.raises(ValueError, match=message) as error:
        fit(model, without(make_spec(model), key), [made(method, reference)])
    assert "\n" not in str(error.value)


def test_two_weightings_are_refused(tokenizer, make_spec, reference):
    model = small_lvlm("patches", tokenizer)
    with pytest.raises(ValueError, match=r"PRIOR and Focal both weight the tokens: leave all but one out\."):
        fit(model, make_spec(model), [PRIOR(reference), Focal()])


@pytest.mark.parametrize("method", WEIGHTINGS)
def test_what_is_logged(tokenizer, make_spec, reference, method):
    model = small_lvlm("patches", tokenizer)
    takes_reference = issubclass(method, (PRIOR, Rho1))
    _, logged = fit(model, make_spec(model), [made(method, reference)])
    names = {name for name in logged if name.startswith(f"{method.name}/")}
    expected = {"effective_sample_size", "top_decile_share", "loss_weighted", "loss_unweighted"}
    expected |= {"reference_nll"} if takes_reference else {"difference"} if method in (CAL, DPA) else set()
    assert names == {f"{method.name}/{name}" for name in expected}
    assert float(logged["loss/train/total"][0][1]) == pytest.approx(
        logged[f"{method.name}/loss_weighted"][0][1], rel=1e-5
    )
    plain = float(logged["metrics/train/loss"][-1][1])
    assert logged[f"{method.name}/loss_unweighted"][0][1] == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("method", [Rho1, ReGATE, CAL, DPA, Focal])
def test_a_language_model_on_text_alone(tokenizer, make_spec, make_batch, reference, method):
    model = ComposerLVLM(small_lm(tokenizer), tokenizer)
    batch = make_batch(None)
    mask = batch["labels"] != IGNORE_INDEX
    with torch.no_grad():
        logits = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
    nll = torch.zeros(batch["labels"].shape, dtype=torch.float64)
    for row, place in mask.nonzero().tolist():
        nll[row, place] = -logits[row, place - 1].log_softmax(-1)[batch["labels"][row, place]]
    scores = reference.logprobs(batch["input_ids"], batch["attention_mask"], batch["labels"])
    weights = {
        Rho1: lambda: normalize(selection_weights(nll, scores, mask), mask),
        ReGATE: lambda: normalize(difficulty_weights(nll, scores, mask), mask),
        CAL: lambda: mask.float(),  # there is no image, so every difference is 0
        DPA: lambda: mask.float(),
        Focal: lambda: focal_weights(nll, mask),
    }[method]()
    _, logged = fit(model, make_spec(None), [made(method, reference)])
    expected = float((nll * weights).sum() / mask.sum())
    assert float(logged["loss/train/total"][0][1]) == pytest.approx(expected, rel=1e-5)
    if method is CAL:
        assert logged["cal/difference"][0][1] == pytest.approx(0.0, abs=1e-5)


class Seen(Callback):
    """Keep what each step has before its loss."""

    def __init__(self):
        self.steps = []

    def before_loss(self, state, logger):
        batch = state.batch
        if "token_weights" not in batch:
            return
        for row, keep in enumerate(batch["labels"] != IGNORE_INDEX):
            values = (batch["token_weights"] > 0, state.outputs["nll"].detach(), batch["ref_logprobs"])
            of_tokens = [value[row][keep] for value in values]
            self.steps.append((int(state.timestamp.batch), int(batch["sample_id"][row]), *of_tokens))


@pytest.mark.parametrize("microbatch", [16, 5])
def test_regate_averages_losses_over_epochs(tokenizer, make_spec, reference, microbatch):
    model, seen = small_lvlm("patches", tokenizer), Seen()
    algorithm = ReGATE(reference, decay=0.75, cycle=5, dense=2, start="1ba")
    spec = make_spec(model, batch_size=16, shuffle=True)
    fit(model, spec, [algorithm], "3ep", [seen], device_train_microbatch_size=microbatch)
    averages, sparse = {}, 0
    for step, sample, kept, nll, text in seen.steps:
        if sample in averages:
            averages[sample] = 0.75 * averages[sample] + 0.25 * nll
        else:
            averages[sample] = nll
        if step % 5 < 2:
            assert kept.all()
        else:
            scores = averages[sample] - 0.5 * text
            assert kept.sum() == math.ceil(len(kept) / 2)
            assert scores[kept].min() >= scores[~kept].max() - 1e-6
            sparse += 1
    assert [step for step, *_ in seen.steps[:1]] == [1]
    assert sparse > 96
    other = ReGATE(reference)
    other.load_state_dict(algorithm.state_dict())
    for found, average in zip(other.difficulty.values(), averages.values(), strict=True):  # in the order of the visits
        torch.testing.assert_close(found, average)


def test_regate_averages_each_caption_of_a_sample_alone():
    algorithm, ids = ReGATE(decay=0.5, cycle=4, dense=4), torch.tensor([7, 7, 8])
    labels = torch.tensor([[-100, 3, 4], [-100, 4, 3], [-100, 3, 4]])
    for loss in (1.0, 3.0):
        nll = loss * torch.tensor([[0.0, 1, 2], [0, 3, 4], [0, 5, 6]])
        batch = {"labels": labels, "sample_id": ids}
        state = SimpleNamespace(batch=batch, outputs={"nll": nll}, timestamp=Timestamp())
        algorithm.raw_weights(state, labels != IGNORE_INDEX)
        algorithm.apply(Event.BATCH_END, state, None)
    assert [one.tolist() for one in algorithm.difficulty.values()] == [[2, 4], [6, 8], [10, 12]]


def test_an_average_starts_at_the_first_loss():
    losses = torch.tensor([1.0, 2.0])
    assert torch.equal(averaged(losses, None, 0.9), losses)
    assert torch.equal(averaged(losses, torch.zeros(3), 0.9), losses)  # the caption was cut then
    torch.testing.assert_close(averaged(losses, torch.zeros(2), 0.9), torch.tensor([0.1, 0.2]))


@pytest.mark.parametrize("method", WEIGHTINGS)
def test_composers_own_wrapper_is_refused(tokenizer, make_spec, reference, method):
    model = HuggingFaceModel(small_lm(tokenizer), tokenizer=tokenizer, use_logits=True)
    with pytest.raises(ValueError, match=f"^{method.__name__} needs a model that applies token_weights") as error:
        fit(model, make_spec(None), [made(method, reference)])
    assert str(error.value).endswith("wrap the model of transformers in ComposerLVLM(model, processor).")
    assert "\n" not in str(error.value)


def test_cal_refuses_a_model_that_gives_no_logits_of_labels(tokenizer, make_spec):
    class Other(HuggingFaceModel):
        honours_token_weights = True

    model = Other(small_lm(tokenizer), tokenizer=tokenizer, use_logits=True)
    with pytest.raises(ValueError, match="CAL needs the logits of the labels, which Other does not give"):
        fit(model, make_spec(None), [CAL()])


def test_logits_of_labels(lvlm, make_batch):
    lvlm.label_logits = True
    batch = make_batch(lvlm)
    with torch.no_grad():
        found = lvlm(batch)["label_logits"]
        logits = full_logits(lvlm.model, batch)
    for row, place in (batch["labels"] != IGNORE_INDEX).nonzero().tolist():
        expected = float(logits[row, place - 1, batch["labels"][row, place]])
        assert float(found[row, place]) == pytest.approx(expected, abs=1e-4)


def test_a_label_without_text_before_it_counts_as_no_difference(tokenizer):
    model = small_lvlm("patches", tokenizer)
    ids = torch.tensor([[image_token_ids(model.tokenizer)[0], 5, 6]])
    labels = torch.tensor([[IGNORE_INDEX, 5, 6]])
    found = model.text_label_logits(ids, torch.tensor([[False, True, True]]), labels)
    assert found.isnan().tolist() == [[False, True, False]]
