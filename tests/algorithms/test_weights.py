"""The formula against a float64 loop over tokens, and what it refuses."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from composer_prior import importance_weights

# 1 - P below 1e-18 is left out: float32 cannot hold its square. No reference gives it: float32's logits end at 1e-7.
LOGPROBS = st.one_of(st.floats(-40, -1e-18), st.sampled_from([0.0, -0.0, -1e-9, -1e-18, -math.inf, -1e4]))


def oracle(logprobs, mask, alpha, normalization, floor):
    """The formula of the paper, one token at a time, in float64."""
    raw = [
        [floor + (1 - floor) * (-math.expm1(x)) ** alpha if m else 0.0 for x, m in zip(row, keep, strict=True)]
        for row, keep in zip(logprobs, mask, strict=True)
    ]
    total, count = sum(map(sum, raw)), sum(map(sum, mask))
    weights = []
    for row, keep in zip(raw, mask, strict=True):
        if normalization == "sequence":
            total, count = sum(row), sum(keep)
        if normalization == "none":
            weights.append(row)
        else:
            weights.append(
                [(count * w / total if total > 0 else 1.0) if m else 0.0 for w, m in zip(row, keep, strict=True)]
            )
    return torch.tensor(weights, dtype=torch.float64)


@settings(max_examples=300, deadline=None)
@given(
    rows=st.integers(1, 7).flatmap(
        lambda length: st.lists(
            st.lists(st.tuples(LOGPROBS, st.booleans()), min_size=length, max_size=length), min_size=1, max_size=4
        )
    ),
    alpha=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    normalization=st.sampled_from(["sequence", "batch", "none"]),
    floor=st.sampled_from([0.0, 0.1, 0.3, 0.9]),
)
def test_weights_are_those_of_a_float64_loop(rows, alpha, normalization, floor):
    # The loop sees the numbers that the tensor holds.
    logprobs = torch.tensor([[x for x, _ in row] for row in rows], dtype=torch.float32)
    mask = torch.tensor([[m for _, m in row] for row in rows])
    weights = importance_weights(logprobs, mask, alpha, normalization, floor)
    expected = oracle(logprobs.tolist(), mask.tolist(), alpha, normalization, floor)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.double(), expected, rtol=2e-6, atol=1e-37)


def test_a_known_example():
    logprobs = torch.tensor([[0.5, 0.9, 1.0, 0.1]]).log()
    weights = importance_weights(logprobs, torch.tensor([[True, True, True, False]]))
    torch.testing.assert_close(weights, 3 * torch.tensor([[0.5, 0.1, 0.0, 0.0]]) / 0.6)


@pytest.mark.parametrize("normalization", ["sequence", "batch"])
def test_weights_sum_to_the_number_of_tokens(normalization):
    logprobs = -torch.rand(5, 9, generator=torch.Generator().manual_seed(0)) * 8
    mask = torch.rand(5, 9, generator=torch.Generator().manual_seed(1)) < 0.6
    weights = importance_weights(logprobs, mask, normalization=normalization)
    torch.testing.assert_close(weights.sum(), mask.sum().float())
    if normalization == "sequence":
        torch.testing.assert_close(weights.sum(1), mask.sum(1).float())


@pytest.mark.parametrize("normalization", ["sequence", "batch", "none"])
@pytest.mark.parametrize("floor", [0.0, 0.1, 0.3, 0.7])
def test_alpha_zero_gives_exactly_one(normalization, floor):
    logprobs = torch.tensor([[0.0, -1e-9, -3.0, -math.inf, -0.3, -7.0, -0.1]] * 3)
    mask = torch.arange(7) < torch.tensor([[7], [3], [0]])
    weights = importance_weights(logprobs, mask, 0.0, normalization, floor)
    assert torch.equal(weights, mask.float())


def test_certain_tokens_weigh_nothing_unless_all_are_certain():
    logprobs = torch.tensor([[0.0, -1.0], [0.0, 0.0]])
    weights = importance_weights(logprobs, torch.ones(2, 2, dtype=torch.bool))
    assert weights.tolist() == [[0.0, 2.0], [1.0, 1.0]]


def test_one_minus_p_stays_exact_near_one():
    weights = importance_weights(
        torch.tensor([[-1e-9, -3e-9]]), torch.ones(1, 2, dtype=torch.bool), normalization="none"
    )
    torch.testing.assert_close(weights, torch.tensor([[1e-9, 3e-9]]), rtol=1e-6, atol=0.0)


def test_padding_does_not_matter():
    mask = torch.tensor([[True, True, False]])
    known = importance_weights(torch.tensor([[-1.0, -2.0, 0.0]]), mask)
    hostile = importance_weights(torch.tensor([[-1.0, -2.0, math.nan]]), mask)
    assert torch.equal(known, hostile)
    assert hostile[0, 2] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": -0.1}, "alpha=-0.1"),
        ({"alpha": math.nan}, "alpha=nan"),
        ({"floor": 1.0}, "floor=1.0"),
        ({"floor": -0.1}, "floor=-0.1"),
        ({"normalization": "token"}, "'token'"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        importance_weights(torch.tensor([[-1.0]]), torch.tensor([[True]]), **arguments)


@pytest.mark.parametrize("bad", [math.nan, 0.1, math.inf])
def test_values_that_are_no_log_probabilities_are_refused(bad):
    logprobs = torch.tensor([[-1.0, -1.0], [-1.0, bad]])
    with pytest.raises(ValueError, match=r"NaN or positive, the first at row 1, position 1"):
        importance_weights(logprobs, torch.ones(2, 2, dtype=torch.bool))


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="differ in shape"):
        importance_weights(torch.zeros(2, 3), torch.ones(2, 2, dtype=torch.bool))


@pytest.mark.slow
def test_the_formula_needs_no_composer():
    code = "import sys; from composer_prior import importance_weights as w; sys.exit('composer' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
