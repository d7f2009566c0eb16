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


def test_confidence_interval_stays_in_range():
    assert metrics.confidence_interval([1.0, 1.0]) == (1.0, 1.0)
    low, high = metrics.confidence_interval([0.0, 1.0, 1.0])
    assert low == 0.0 and high == 1.0


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
    assert summary.pop("ci95") == [0.0, 0.5]
    assert summary == {
        "avg_at_k": 0.25,
        "best_at_k": 0.5,
        "pass_at_k": {"1": 0.25, "2": 0.5},
        "majority_at_k": 0.5,
        "dist_4g": 0.25,
        "mean_length": 3.0,
        "truncated_share": 0.25,
        "num_problems": 2,
        "samples": 2,
    }
