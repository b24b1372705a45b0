"""Comparisons are paired by seed, and their intervals are those of resampled seeds."""

import math
import random
import warnings
from statistics import fmean

import numpy as np
import pytest

from composer_prior.studies.comparison import (
    HELD,
    average_improvement,
    compare,
    steps_until,
    steps_until_baseline,
    word,
)

BASE = {"1": 1.02, "2": 1.11, "3": 0.95, "4": 1.3, "5": 0.88}
OTHER = {"1": 1.0, "2": 1.05, "3": 0.96, "4": 1.2, "5": 0.85}


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def percentiles(values: list[float]) -> tuple[float, float]:
    values = sorted(values)
    return values[int(0.025 * len(values))], values[int(0.975 * len(values))]


def resampled(statistic, seeds: list[str], draws: int = 40_000) -> tuple[float, float]:
    """Percentiles of what a function of drawn seeds returns, in plain loops."""
    dice = random.Random(3)
    return percentiles([statistic([dice.choice(seeds) for _ in seeds]) for _ in range(draws)])


@pytest.mark.parametrize(("better", "sign"), [("higher", 1), ("lower", -1)])
def test_a_difference_is_that_of_the_pairs(better, sign):
    found = compare(BASE, OTHER, better)
    difference = fmean(OTHER[seed] - BASE[seed] for seed in BASE)
    assert found.seeds == 5
    assert found.difference == pytest.approx(difference, rel=1e-12)
    assert found.improvement == pytest.approx(sign * difference / fmean(BASE.values()), rel=1e-12)
    expected = resampled(lambda seeds: fmean(OTHER[s] - BASE[s] for s in seeds), list(BASE))
    assert found.difference_interval == pytest.approx(expected, abs=0.003)
    expected = resampled(
        lambda seeds: sign * fmean(OTHER[s] - BASE[s] for s in seeds) / fmean(BASE[s] for s in seeds), list(BASE)
    )
    assert found.improvement_interval == pytest.approx(expected, abs=0.003)
    assert found.word == ("worse" if better == "higher" else "better")


def test_pairing_by_seed_sees_what_the_seeds_hide():
    spread = {str(seed): float(seed) for seed in range(1, 9)}  # seeds differ by far more than methods
    found = compare(spread, {seed: value - 0.01 * (1 + value / 10) for seed, value in spread.items()}, "lower")
    assert found.word == "better"
    dice = random.Random(0)
    values = list(spread.values())
    unpaired = percentiles(
        [fmean(dice.choices(values, k=8)) - 0.015 - fmean(dice.choices(values, k=8)) for _ in range(5000)]
    )
    low, high = found.difference_interval
    assert unpaired[0] < 0 < unpaired[1]
    assert high - low < 0.01 * (unpaired[1] - unpaired[0])


def test_only_seeds_that_both_have_count_and_those_without_a_number_are_named():
    base = {**BASE, "6": 7.0, "7": None, "8": 1.0}
    other = {**OTHER, "7": 1.0, "8": math.nan, "9": 50.0}
    found = compare(base, other, "lower")
    assert found.left_out == ("7", "8")
    assert (found.seeds, found.difference) == (5, compare(BASE, OTHER, "lower").difference)
    assert found.difference_interval == compare(BASE, OTHER, "lower").difference_interval
    nothing = compare({"1": None}, {"1": 1.0, "2": 2.0}, "lower")
    assert (nothing.seeds, nothing.difference, nothing.improvement, nothing.left_out) == (0, None, None, ("1",))


def test_degenerate_data():
    twice = {"1": 1.0, "2": 2.0}
    found = compare(twice, {"1": 2.0, "2": 3.0}, "higher")
    assert (found.difference, found.difference_interval, found.improvement_interval, found.word) == (
        1.0,
        None,
        None,
        "",
    )
    same = {str(seed): 2.0 for seed in range(5)}
    found = compare(same, dict.fromkeys(same, 1.5), "lower")
    assert (found.difference_interval, found.improvement_interval) == ((-0.5, -0.5), (0.25, 0.25))
    assert compare(same, same, "lower").word == "no difference seen"
    zero = compare(dict.fromkeys(same, 0.0), same, "higher")
    assert (zero.improvement, zero.improvement_interval, zero.difference_interval) == (None, None, (2.0, 2.0))
    assert zero.word == "better"
    negative = compare(dict.fromkeys(same, -2.0), dict.fromkeys(same, -1.0), "higher")
    assert negative.improvement == 0.5


def test_words_are_said_where_the_interval_excludes_0_alone():
    assert [word(interval) for interval in ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.1), (0.0, 0.1), (-0.1, 0.0), None)] == [
        "better", "worse", "no difference seen", "no difference seen", "no difference seen", "",
    ]  # fmt: skip


def test_the_average_is_over_figures_and_draws_their_seeds_together():
    opposite = {seed: 3 - value for seed, value in BASE.items()}
    # What one figure gains at a seed the other loses: only together do they cancel.
    figures = {
        "a": (dict.fromkeys(BASE, 1.0), BASE, "higher"),
        "b": (dict.fromkeys(BASE, 2.0), {seed: 2 * value for seed, value in opposite.items()}, "higher"),
    }
    found = average_improvement(figures)
    assert found.value == pytest.approx(0.5)
    assert found.interval == pytest.approx((0.5, 0.5))
    apart = compare(*figures["a"]).improvement_interval
    assert apart[1] - apart[0] > 0.1

    figures = {"a": (BASE, OTHER, "lower"), "b": (OTHER, {**BASE, "2": None}, "higher")}

    def statistic(seeds):
        second = [seed for seed in seeds if seed != "2"] or ["1"]
        first = fmean(BASE[s] - OTHER[s] for s in seeds) / fmean(BASE[s] for s in seeds)
        return (first + fmean(BASE[s] - OTHER[s] for s in second) / fmean(OTHER[s] for s in second)) / 2

    found = average_improvement(figures)
    each = [compare(*figure).improvement for figure in figures.values()]
    assert found.value == pytest.approx(fmean(each))
    assert found.seeds == 4
    assert found.interval == pytest.approx(resampled(statistic, list(BASE)), abs=0.002)


def test_a_figure_without_an_improvement_is_left_out_of_the_average():
    figures = {
        "there": (BASE, OTHER, "lower"),
        "zero": (dict.fromkeys(BASE, 0.0), OTHER, "higher"),
        "absent": (dict.fromkeys(BASE), OTHER, "higher"),
    }
    found = average_improvement(figures)
    assert found.left_out == ("zero", "absent")
    assert found.value == compare(BASE, OTHER, "lower").improvement
    assert average_improvement({}).value is None
    few = average_improvement({"a": (BASE, OTHER, "lower"), "b": (BASE, {"1": 1.0, "2": 2.0}, "lower")})
    assert few.seeds == 2
    assert few.interval is None


def test_steps_until_a_value_is_reached():
    batches = [10, 20, 30, 40]
    assert steps_until((batches, [5.0, 4.0, 2.0, 1.0]), 3.0, "lower") == 25
    assert steps_until((batches, [1.0, 2.0, 4.0, 3.0]), 3.0, "higher") == 25
    assert steps_until((batches, [5.0, None, 2.0, 1.0]), 3.5, "lower") == 20, "between the evaluations that there are"
    assert steps_until((batches, [3.0, 4.0, 2.0, 1.0]), 3.0, "lower") == 10
    assert steps_until((batches, [5.0, 4.0, 4.0, 3.01]), 3.0, "lower") is None
    assert steps_until(([], []), 3.0, "lower") is None

    base = {seed: (batches, [5.0, 4.0, 3.0, 2.0 + seed / 10]) for seed in range(1, 6)}
    faster = {seed: (batches, [4.0, 2.0 + seed / 10, 1.0, 0.5]) for seed in range(1, 6)}
    found = steps_until_baseline(base, faster, "lower")
    assert found.shares == dict.fromkeys(range(1, 6), 0.5)
    assert (found.mean, found.interval) == (0.5, (0.5, 0.5))
    half = {1: faster[1], 2: (batches, [9.0] * 4), 3: (batches, [4.0, 3.0, 2.3, 1.0])}
    found = steps_until_baseline(base, half, "lower")
    assert found.shares == {1: 0.5, 2: None, 3: 0.75}
    assert (found.mean, found.interval) == (0.625, None)
    ends_without = {1: (batches, [5.0, 4.0, 3.0, None])}
    assert steps_until_baseline(ends_without, ends_without, "lower").shares == {1: 1.0}


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_how_often_intervals_hold_the_truth(seeds):
    drawn = np.random.default_rng(1).normal(0, 1, (1500, seeds))
    choices = np.random.default_rng(2).integers(0, seeds, (1000, seeds))
    low, high = np.percentile(drawn[:, choices].mean(axis=2), [2.5, 97.5], axis=1)
    assert 100 * np.mean((low < 0) & (high > 0)) == pytest.approx(HELD[seeds], abs=3)
