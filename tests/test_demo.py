"""`oprd demo` from start to finish, at a very small size."""

import json

import pytest

from oprd import cli

ARMS = ["student", "teacher", "oprd", "opd_sampled_token", "opd_top_k"]
FIELDS = {
    "avg_at_k",
    "ci95",
    "best_at_k",
    "dist_4g",
    "mean_length",
    "seconds_per_update",
    "transient_mb",
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo") / "out"
    argv = ["demo", "--output", str(output), "--steps", "2", "--problems", "4", "--samples", "2"]
    assert cli.run(argv) == 0
    return argv, output


def test_summary(demo):
    _, output = demo
    summary = json.loads((output / "summary.json").read_text())
    assert list(summary["arms"]) == ARMS
    for name, arm in summary["arms"].items():
        assert set(arm) == FIELDS
        assert 0 <= arm["ci95"][0] <= arm["avg_at_k"] <= arm["ci95"][1] <= 1
        assert (arm["seconds_per_update"] is None) == (name in ("student", "teacher"))
    student, teacher = (summary["arms"][n]["avg_at_k"] for n in ("student", "teacher"))
    for name, closed in summary["gap_closed"].items():
        assert closed == pytest.approx((summary["arms"][name]["avg_at_k"] - student) / (teacher - student))
    assert set(summary["gap_closed"]) == set(ARMS[2:])
    assert summary["settings"]["steps"] == 2


def test_runs_and_plots(demo):
    _, output = demo
    for arm in ARMS[2:]:
        records = [json.loads(line) for line in (output / arm / "metrics.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records] == [1, 2]
        assert "eval/avg_at_k" in records[-1]
        assert (output / arm / "model.safetensors").exists()
    for plot in ("accuracy", "cosine", "length"):
        assert (output / f"{plot}.png").stat().st_size > 5000


def test_all_arms_start_alike(demo):
    """Same student, same prompts, same seed: the first rollouts have one length."""
    _, output = demo
    first = [json.loads((output / arm / "metrics.jsonl").read_text().splitlines()[0]) for arm in ARMS[2:]]
    assert len({record["rollout/mean_length"] for record in first}) == 1


def test_again_repeats_nothing_and_other_settings_are_refused(demo, capsys):
    argv, output = demo
    before = {file: file.stat().st_mtime_ns for file in output.rglob("model.safetensors")}
    assert cli.run(argv) == 0
    assert {file: file.stat().st_mtime_ns for file in output.rglob("model.safetensors")} == before
    capsys.readouterr()
    assert cli.run([*argv, "--seed", "1"]) == 2
    assert "other settings" in capsys.readouterr().err
