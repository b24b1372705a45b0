"""Scaling fits find what data were made from, and say where data do not determine them."""

import warnings

import numpy as np
import pytest
from scipy.optimize import least_squares

from composer_prior.studies.scaling import Points, differences, fit, line, points, power_law

X = np.geomspace(1e9, 1e12, 6)
SEEDS = tuple("12345")


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def law(a: float = 0.5, b: float = 3.0, c: float = 0.3, x=X) -> np.ndarray:
    """With C in units of 1e9."""
    return a + b * (x / 1e9) ** -c


def noisy(y: np.ndarray, sd: float = 0.004, seed: int = 0, seeds=SEEDS, x=X) -> Points:
    return Points(x, tuple(seeds), y[:, None] + np.random.default_rng(seed).normal(0, sd, (len(y), len(seeds))))


@pytest.mark.parametrize(("a", "b", "c"), [(0.5, 3.0, 0.3), (0.0, 2.0, 0.07), (2.0, 0.4, 1.2), (1.7, 40.0, 0.05)])
def test_a_law_is_recovered(a, b, c):
    found = [float(values[0]) for values in power_law(X, law(a, b, c)[None])]
    assert found == pytest.approx([a, b * 1e9**c, c], rel=1e-3, abs=1e-3)


def test_no_start_finds_a_better_fit():
    rng = np.random.default_rng(5)
    y = np.abs(law() + rng.normal(0, 0.15, (20, len(X))))
    a, b, c = power_law(X, y)
    unit = X / 1e9
    for curve in range(len(y)):
        errors = y[curve] - a[curve] - (b[curve] * X ** -np.nan_to_num(c[curve]) if b[curve] else 0.0)

        def residuals(p, curve=curve):
            return p[0] + np.exp(p[1] - np.exp(p[2]) * np.log(unit)) - y[curve]

        bounds = ([0, -20, np.log(1e-3)], [50, 20, np.log(10)])
        starts = [(0.5, 1, np.log(start)) for start in (0.01, 0.1, 0.5, 2)]
        best = min(2 * least_squares(residuals, start, bounds=bounds).cost for start in starts)
        assert (errors**2).sum() <= best * (1 + 1e-6)


def test_the_straight_line_is_that_of_least_squares():
    logs = np.log(law())[None]
    k0, k = line(X, logs)
    slope, start = np.polyfit(np.log(X), logs[0], 1)
    assert (k0[0], k[0]) == pytest.approx((start, -slope))
    assert line(X, np.log(7 * X**-0.21)[None])[1][0] == pytest.approx(0.21)


def test_intervals_are_those_of_resampled_seeds():
    found = noisy(law(), sd=0.02)
    coefficients = fit(found).coefficients
    rng = np.random.default_rng(9)
    drawn = []
    for _ in range(3000):
        seeds = rng.integers(0, 5, 5)
        chosen = found.y[:, seeds]
        of_draw = [float(values[0]) for values in power_law(X, chosen.mean(axis=1)[None])]
        drawn.append([of_draw[0], of_draw[2], -np.polyfit(np.log(X), np.log(chosen).mean(axis=1), 1)[0]])
    expected = np.percentile(drawn, [2.5, 97.5], axis=0).T
    for name, interval in zip("ack", expected, strict=True):
        width = interval[1] - interval[0]
        assert coefficients[name].interval == pytest.approx(tuple(interval), abs=0.12 * width), name
        assert coefficients[name].interval[0] <= coefficients[name].value <= coefficients[name].interval[1]


def test_a_planted_difference_is_found_and_none_where_there_is_none():
    wander = np.random.default_rng(1).normal(0, 0.2, 5)  # a seed is lucky with both methods
    base, steeper, shifted = (noisy(law(c=c), seed=n) for n, c in ((1, 0.3), (2, 0.36), (3, 0.3)))
    base, steeper, shifted = (Points(p.x, p.seeds, p.y * np.exp(wander)) for p in (base, steeper, shifted))
    assert differences(base, steeper)["k"].interval[0] > 0
    assert differences(base, steeper)["c"].value == pytest.approx(0.06, abs=0.01)
    low, high = differences(base, shifted)["c"].interval
    assert low < 0 < high
    assert all((d.value, d.interval) == (0.0, (0.0, 0.0)) for d in differences(base, base).values())


def test_differences_are_of_the_seeds_that_both_have():
    base, other = noisy(law()), noisy(law(c=0.4), seeds="234", seed=4)
    own = Points(X, tuple("234"), base.y[:, 1:4])
    found = differences(base, other)
    assert found["k"].value == pytest.approx(fit(other).coefficients["k"].value - fit(own).coefficients["k"].value)
    assert differences(base, noisy(law(), seeds="89")) == {}
    assert differences(base, noisy(law(), seeds="12"))["k"].interval is None


def test_too_few_sizes_and_seeds():
    three = noisy(law(x=X[:3]), x=X[:3])
    found = fit(three)
    assert set(found.coefficients) == {"k0", "k"}
    assert found.notes == ("3 sizes, fewer than 4: no fit with an asymptote",)
    assert fit(noisy(law(x=X[:1]), x=X[:1])).coefficients == {}
    found = fit(noisy(law(), seeds="12"))
    assert all(estimate.interval is None for estimate in found.coefficients.values())
    assert found.notes[0] == "2 seeds at every size, fewer than 3: no intervals"
    assert fit(Points(X, (), np.zeros((6, 0)))).coefficients == {}


def test_what_is_not_determined_is_said():
    assert "a is on its bound 0: these sizes show no asymptote" in fit(noisy(np.log(40e9) - np.log(X) / 2.5)).notes
    rising = fit(noisy(law()[::-1]))
    assert "the values do not fall with size: b is 0 and c is not determined" in rising.notes
    assert "c" not in rising.coefficients
    assert rising.coefficients["k"].value < 0
    for seed in range(8):
        vague = fit(noisy(law(b=0.1), sd=0.08, seed=seed))
        assert any("not determine" in note or "no asymptote" in note for note in vague.notes)
    assert fit(noisy(law())).notes == ()
    negative = fit(noisy(law() - 1))
    assert "k" not in negative.coefficients
    assert "values that are not positive: no straight line in logarithms" in negative.notes


def test_points_are_of_the_seeds_that_every_size_has():
    runs = {
        "large": {"1": (200.0, 1.0), "2": (220.0, 1.5), "3": (None, 1.0)},
        "small": {"2": (20.0, 2.5), "1": (20.0, 2.0), "3": (20.0, 9.0)},
        "empty": {},
        "no number": {"1": (5.0, None)},
    }
    found = points(runs)
    assert found.x.tolist() == [20.0, 210.0]
    assert found.seeds == ("1", "2")
    assert found.y.tolist() == [[2.0, 2.5], [1.0, 1.5]]
    assert points({}).seeds == ()
