from pathlib import Path

import pytest

from oprd.evaluation.table import print_summary

SUMMARY = {
    "avg_at_k": 0.25,
    "ci95": [0.125, 0.4],
    "best_at_k": 0.5,
    "pass_at_k": {"1": 0.25, "2": 0.375, "4": 0.5},
    "majority_at_k": 0.3,
    "dist_4g": 0.875,
    "mean_length": 123.45,
    "truncated_share": 0.1,
    "no_answer_share": 0.05,
    "num_problems": 30,
    "samples": 4,
}


def shown(capsys, **changes):
    print_summary(SUMMARY | changes, Path("runs/eval"))
    return capsys.readouterr().out


def test_every_metric_is_shown(capsys):
    text = shown(capsys)
    for part in ("30 problems", "Avg@4", "25.0%", "12.5%–40.0%", "Best@4", "50.0%", "Maj@4", "30.0%"):
        assert part in text
    for part in ("0.88", "123.5", "truncated", "10.0%", "no answer", "5.0%", "pass@2 37.5%", "runs/eval"):
        assert part in text


@pytest.mark.parametrize(
    ("no_answer", "truncated", "advice"),
    [(0.05, 0.9, None), (0.95, 0.9, "--max_new_tokens"), (0.95, 0.0, "--prompt_suffix")],
)
def test_where_most_responses_state_no_answer_the_likely_cause_is_told(capsys, no_answer, truncated, advice):
    text = shown(capsys, no_answer_share=no_answer, truncated_share=truncated)
    assert ("count as wrong" in text) == (advice is not None)
    for flag in ("--max_new_tokens", "--prompt_suffix"):
        assert (flag in text) == (flag == advice)


def test_a_summary_of_an_older_version_is_shown(capsys):
    older = {key: value for key, value in SUMMARY.items() if key != "no_answer_share"}
    print_summary(older, Path("runs/eval"))
    assert "Avg@4" in capsys.readouterr().out
