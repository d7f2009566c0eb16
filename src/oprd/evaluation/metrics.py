"""Metrics over k samples of each problem, as pure functions; the paper's tables name them.

`correct[i][j]` says whether sample j of problem i is right. Every metric is a share in [0, 1].
"""

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from oprd.evaluation.grade import normalize_answer

Z95 = NormalDist().inv_cdf(0.975)

Correct = Sequence[Sequence[bool]]


def problem_means(correct: Correct) -> list[float]:
    """Share of right samples of each problem. Raises `ValueError` for no problems or no samples."""
    if not correct or not all(correct):
        raise ValueError("a metric needs at least one problem and one sample of each")
    return [sum(samples) / len(samples) for samples in correct]


def avg_at_k(correct: Correct) -> float:
    """Avg@k: mean accuracy over samples, then over problems."""
    return float(np.mean(problem_means(correct)))


def best_at_k(correct: Correct) -> float:
    """Best@k: share of problems with any right sample."""
    return float(np.mean([mean > 0 for mean in problem_means(correct)]))


def pass_at_k(correct_counts: Sequence[int], n: int, k: int) -> float:
    """Unbiased pass@k: the mean over problems of 1 − C(n−c, k) / C(n, k), c of n samples being right.

    Raises `ValueError` unless 1 ≤ k ≤ n. Source: Chen et al. 2021, arXiv 2107.03374, Eq. 1.
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs 1 ≤ k ≤ n, and n is {n}")
    return float(np.mean([1 - math.comb(n - c, k) / math.comb(n, k) for c in correct_counts]))


def majority_at_k(answers: Sequence[Sequence[str | None]], correct: Correct) -> float:
    """Majority@k: share of problems whose most frequent answer is right.

    Answers are grouped by their normal form (`grade.normalize_answer`), the first seen wins a tie, None
    does not vote.
    """
    return float(np.mean([_majority(a, c) for a, c in zip(answers, correct, strict=True)]))


def no_answer_share(answers: Sequence[Sequence[str | None]]) -> float:
    """Share of samples in which no answer was found."""
    return float(np.mean([[answer is None for answer in samples] for samples in answers]))


def dist_n(texts_per_problem: Sequence[Sequence[str]], n: int = 4) -> float:
    """Dist-n: distinct / total whitespace n-grams pooled over a problem's samples, averaged over problems.

    A problem without any n-gram counts as 0.
    """
    return float(np.mean([_distinct_share(texts, n) for texts in texts_per_problem]))


def confidence_interval(problem_means: Sequence[float]) -> tuple[float, float]:
    """95% interval of the mean over problems: Agresti–Coull's, with an effective number of trials.

    n problems whose means have the variance s² around m weigh as m (1 − m) n / s² independent trials. m and
    s² count one problem more that is never solved and one that always is, so that an interval has a width
    where few or no problems are solved. The quantile is Student's t with n + 1 degrees of freedom.

    It covers the true mean at least 93 % of the time for 30 to 128 problems and means from 0.03 to 0.97,
    however much the problems differ (tests/unit/evaluation/test_metrics.py). Source: Brown, Cai and DasGupta
    2001, Interval Estimation for a Binomial Proportion; Kish 1965, Survey Sampling, for the effective number.
    """
    n, mean = len(problem_means), float(np.mean(problem_means))
    padded = np.array([*problem_means, 0.0, 1.0], dtype=np.float64)
    center = float(padded.mean())
    trials = center * (1 - center) * (n + 2) / float(padded.var(ddof=1))
    t = Z95 + (Z95**3 + Z95) / (4 * (n + 1))  # Abramowitz and Stegun 26.7.5
    middle = (mean * trials + t**2 / 2) / (trials + t**2)
    half = t * math.sqrt(middle * (1 - middle) / (trials + t**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def summarize(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All metrics of the lines of a samples.jsonl, each with the same number k of samples.

    `pass_at_k` maps the powers of two up to k (as text, for JSON) to shares; `mean_length` is in tokens.
    """
    correct = _column(records, "correct")
    means, num_samples = problem_means(correct), len(correct[0])
    counts = [sum(samples) for samples in correct]
    powers = [2**i for i in range(num_samples.bit_length())]
    return {
        "avg_at_k": avg_at_k(correct),
        "ci95": list(confidence_interval(means)),
        "best_at_k": best_at_k(correct),
        "pass_at_k": {str(k): pass_at_k(counts, num_samples, k) for k in powers},
        "majority_at_k": majority_at_k(_column(records, "answer"), correct),
        "dist_4g": dist_n(_column(records, "text"), 4),
        "mean_length": float(np.mean(_column(records, "length"))),
        "truncated_share": float(np.mean(_column(records, "truncated"))),
        "no_answer_share": no_answer_share(_column(records, "answer")),
        "num_problems": len(records),
        "samples": num_samples,
    }


def _column(records: Sequence[Mapping[str, Any]], key: str) -> list[list[Any]]:
    return [[sample[key] for sample in record["samples"]] for record in records]


def _majority(answers: Sequence[str | None], correct: Sequence[bool]) -> bool:
    votes: dict[str, list[bool]] = {}
    for answer, right in zip(answers, correct, strict=True):
        if answer is not None:
            votes.setdefault(normalize_answer(answer), []).append(right)
    return max(votes.values(), key=len)[0] if votes else False


def _distinct_share(texts: Sequence[str], n: int) -> float:
    split = [text.split() for text in texts]
    grams = [tuple(words[i : i + n]) for words in split for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
