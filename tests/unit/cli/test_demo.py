"""`oprd demo` from start to finish, at a very small size."""

import json

import pytest
import yaml

from oprd.cli import commands as cli
from oprd.cli.demo import at_share
from oprd.cli.demo_pairs import BRIDGE, SHARED
from oprd.folders.recorder import read_metrics

pytestmark = pytest.mark.xdist_group("demo")

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


@pytest.fixture(scope="module", autouse=True)
def few_and_short_rollouts():
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(SHARED, "per_device_train_batch_size", 8)
        patched.setitem(BRIDGE, "num_prompts", 96)
        for keys in (SHARED, BRIDGE):
            patched.setitem(keys, "max_completion_length", 24)
        yield


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
    for plot in ("accuracy", "cosine", "length", "layers"):
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


@pytest.mark.parametrize("content", ["", "{", "\x00", "[" * 10**5], ids=range(4))
def test_settings_that_cannot_be_read_are_refused(tmp_path, capsys, content):
    (tmp_path / "settings.json").write_text(content)
    assert cli.run(["demo", "--output", str(tmp_path)]) == 2
    assert "settings.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["summary.json", "config.json", "metrics.jsonl"])
def test_a_foreign_folder_is_refused(tmp_path, capsys, content):
    (tmp_path / content).write_text("{}")
    assert cli.run(["demo", "--output", str(tmp_path)]) == 2
    assert f"holds {content}, which is not of this command: choose another" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [content]


BRIDGED = {
    "bridge": ["student", "teacher", "bridge", "bridge_then_opd", "opd_sampled_token"],
    "tokenizer": ["student", "teacher", "bridge", "bridge_then_text", "opd_sampled_text", "bridge_authors"],
}


@pytest.mark.drill
@pytest.mark.parametrize("pair", ["bridge", "tokenizer"])
def test_pairs_that_need_a_bridge(pair, tmp_path, monkeypatch):
    if pair == "tokenizer":
        monkeypatch.setitem(SHARED, "max_completion_length", 64)  # room for lengths to differ
    output = tmp_path / "out"
    argv = ["demo", "--pair", pair, "--output", str(output)]
    assert cli.run([*argv, "--steps", "5", "--problems", "4", "--samples", "2"]) == 0
    summary = json.loads((output / "summary.json").read_text())
    assert list(summary["arms"]) == BRIDGED[pair] and summary["settings"]["pair"] == pair
    assert (output / "fit" / "bridge.safetensors").exists() and (output / "fit" / "ranks.png").exists()
    for arm in BRIDGED[pair][2:]:
        records = [json.loads(line) for line in (output / arm / "metrics.jsonl").read_text().splitlines()]
        assert ("loss/representation" in records[0]) == (arm.startswith("bridge") and "text" not in arm)
        assert ("loss/output" in records[-1]) == ("opd" in arm or "text" in arm)
        assert ("rollout/coverage" in records[0]) == (pair == "tokenizer" and arm != "bridge_authors")
    assert (output / "accuracy.png").stat().st_size > 5000
    if pair == "tokenizer":
        check_two_runs(output / "bridge_then_text-first", output / "bridge_then_text")


def check_two_runs(first_folder, then_folder):
    """Half the steps through the bridge, half over the text from there, on other prompts."""
    first, then = (read_metrics(folder / "metrics.jsonl") for folder in (first_folder, then_folder))
    assert [r["step"] for r in first] == [1, 2] and [r["step"] for r in then] == [1, 2, 3]
    assert all("loss/representation" in r and "loss/output" not in r for r in first)
    assert all("loss/output" in r and "loss/representation" not in r for r in then)
    assert str(first_folder) in json.dumps(yaml.safe_load((then_folder / "resolved.yaml").read_text()))
    assert first[0]["rollout/mean_length"] != then[0]["rollout/mean_length"]


@pytest.mark.parametrize(
    ("schedule", "steps", "written"),
    [
        ("0=1,75%=1,75%+=0", 220, "0=1,165=1,166=0"),
        ("0=1,75%=1,75%+=0", 1, "0=1,1=1,2=0"),
        ("0.5", 9, "0.5"),
    ],
)
def test_schedules_by_share(schedule, steps, written):
    assert at_share(schedule, steps) == written


def test_more_problems_than_there_are(tmp_path, capsys):
    assert cli.run(["demo", "--problems", "300", "--output", str(tmp_path / "demo")]) == 2
    assert "there are 256 held out" in capsys.readouterr().err and not (tmp_path / "demo").exists()
