import math
from itertools import combinations

import numpy as np
import pytest

from oprd.evaluation import metrics

CORRECT = [[True, False, False, True], [False] * 4, [True] * 4]


def test_avg_and_best():
    assert metrics.problem_means(CORRECT) == [0.5, 0.0, 1.0]
    assert metrics.avg_at_k(CORRECT) == 0.5
    assert metrics.best_at_k(CORRECT) == pytest.approx(2 / 3)


@pytest.mark.parametrize("correct", [[], [[]], [[True], []]])
def test_nothing_to_average_is_an_error(correct):
    with pytest.raises(ValueError, match="at least one problem"):
        metrics.avg_at_k(correct)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(k):
    n, counts = 5, [0, 1, 3, 5]
    expected = np.mean([np.mean([min(s) < c for s in combinations(range(n), k)]) for c in counts])
    assert metrics.pass_at_k(counts, n, k) == pytest.approx(expected, abs=1e-15)


def test_pass_at_the_ends_is_avg_and_best():
    counts = [sum(c) for c in CORRECT]
    assert metrics.pass_at_k(counts, 4, 1) == metrics.avg_at_k(CORRECT)
    assert metrics.pass_at_k(counts, 4, 4) == metrics.best_at_k(CORRECT)


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_k_needs_k_samples(k):
    with pytest.raises(ValueError, match="1 ≤ k ≤ n"):
        metrics.pass_at_k([1], 4, k)


@pytest.mark.parametrize(
    ("answers", "correct", "expected"),
    [
        (["7", "8", "7"], [False, True, False], 0.0),
        (["8", "7.0", "$7$", "7"], [False, True, True, True], 1.0),
        (["8", "1/2", r"\frac12", r"$\dfrac{1}{2}$."], [False, True, True, True], 1.0),
        (["D", "(C)", r"\textbf{(C)}\ 10", "C)"], [False, True, True, True], 1.0),
        (["9", "Monday", r"\text{monday}"], [False, True, True], 1.0),
        (["7", "8"], [True, False], 1.0),
        (["8", "7"], [False, True], 0.0),
        ([None, None, "7"], [False, False, True], 1.0),
        ([None, None], [False, False], 0.0),
    ],
)
def test_majority(answers, correct, expected):
    assert metrics.majority_at_k([answers], [correct]) == expected


def test_dist_n_pools_samples_then_averages_problems():
    texts = [["a b c d e", "a b c d"], ["x y z"], ["p q r s"]]
    assert metrics.dist_n(texts) == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert metrics.dist_n([["a a\ta"]], n=1) == pytest.approx(1 / 3)


def test_confidence_interval_matches_the_normal_one_for_many_problems():
    means = np.random.default_rng(1).random(400)
    low, high = metrics.confidence_interval(means)
    half = 1.96 * means.std() / 20
    assert low == pytest.approx(means.mean() - half, abs=2e-3)
    assert high == pytest.approx(means.mean() + half, abs=2e-3)
    assert (low, high) == metrics.confidence_interval(means)


def test_confidence_interval_by_hand():
    """One of 38 solved: with one problem more of each kind, 2 of 40, whose variance is 0.95 · 2 / 39."""
    trials, t = 0.05 * 0.95 * 40 / (0.95 * 2 / 39), 2.0227
    middle = (trials / 38 + t**2 / 2) / (trials + t**2)
    half = t * (middle * (1 - middle) / (trials + t**2)) ** 0.5
    low, high = metrics.confidence_interval([1.0] + [0.0] * 37)
    assert low == max(0, middle - half) and high == pytest.approx(middle + half, abs=3e-4)


@pytest.mark.parametrize("n", [30, 64, 128])
def test_an_interval_of_nothing_solved_has_a_width(n):
    low, high = metrics.confidence_interval([0.0] * n)
    assert low == 0 and 3 / n < high < 7 / n  # 3 / n: the rule of three
    assert metrics.confidence_interval([1.0] * n) == (pytest.approx(1 - high), 1.0)


def test_an_interval_narrows_where_problems_are_alike():
    low, high = metrics.confidence_interval([0.5] * 64)
    wide_low, wide_high = metrics.confidence_interval([0.0, 1.0] * 32)
    assert high - low < 0.4 * (wide_high - wide_low)


@pytest.mark.parametrize("n", [30, 33, 64, 83, 128])
def test_coverage_of_one_sample_a_problem_is_exact(n):
    """The probability of every count, where each problem is solved once with the same probability."""
    bounds = [metrics.confidence_interval([1.0] * c + [0.0] * (n - c)) for c in range(n + 1)]
    for p in np.linspace(0.03, 0.97, 95):
        chances = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
        covered = sum(chance for chance, (low, high) in zip(chances, bounds, strict=True) if low <= p <= high)
        assert covered >= 0.93


def difficulties(kind, mean, size, generator):
    """Probabilities of solving problems, `mean` on average."""
    if kind == "equal":
        return np.full(size, mean)
    if kind == "bimodal":
        return (generator.random(size) < mean).astype(float)
    if kind == "beta":
        return generator.beta(mean, 1 - mean, size)
    solved = max(0.5, mean)  # few are ever solved, or few are ever missed
    if mean > 0.5:
        return 1 - difficulties(kind, 1 - mean, size, generator)
    return np.where(generator.random(size) < mean / solved, solved, 0.0)


@pytest.mark.parametrize("mean", [0.03, 0.2, 0.5, 0.97])
@pytest.mark.parametrize("kind", ["equal", "bimodal", "beta", "few"])
@pytest.mark.parametrize(("n", "k"), [(30, 16), (30, 2), (128, 4)])
def test_coverage_however_much_problems_differ(n, k, kind, mean):
    generator = np.random.default_rng(0)
    chances = difficulties(kind, mean, (1500, n), generator)
    bounds = [metrics.confidence_interval(row) for row in generator.binomial(k, chances) / k]
    assert np.mean([low <= mean <= high for low, high in bounds]) >= 0.93


def test_summary_by_hand():
    def sample(text, answer, correct, length, truncated=False):
        return {
            "text": text,
            "answer": answer,
            "correct": correct,
            "length": length,
            "truncated": truncated,
        }

    records = [
        {"samples": [sample("a b c d", "7", True, 4), sample("a b c d", None, False, 6, True)]},
        {"samples": [sample("a", "1", False, 1), sample("", "1", False, 1)]},
    ]
    summary = metrics.summarize(records)
    assert summary.pop("ci95") == list(metrics.confidence_interval([0.5, 0.0]))
    assert summary == {
        "avg_at_k": 0.25,
        "best_at_k": 0.5,
        "pass_at_k": {"1": 0.25, "2": 0.5},
        "majority_at_k": 0.5,
        "dist_4g": 0.25,
        "mean_length": 3.0,
        "truncated_share": 0.25,
        "no_answer_share": 0.25,
        "num_problems": 2,
        "samples": 2,
    }
