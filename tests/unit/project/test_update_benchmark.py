"""The benchmark of the actor update: arms of one objective give one loss and one gradient."""

import csv
import sys
from dataclasses import replace

import pytest
import torch

from places import BENCHMARKS

sys.path.insert(0, str(BENCHMARKS))

import actor_update
import arms
import harness

SHAPE = arms.Shape(3, 32, 64, 2, 1, 97, 40, 12, rollouts=2)


def loss_and_gradient(name, shape=SHAPE):
    arm = arms.Arm(name, shape)
    value = arm.loss()
    value.backward()
    named = arm.student.named_parameters()
    return value.item(), {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named}


@pytest.mark.parametrize("rows", arms.ROWS)
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("oprd", "authors"),
        ("sampled_token", "sampled_token_whole"),
        ("top_16", "top_16_whole"),
        ("full_vocab", "full_vocab_whole"),
        ("full_vocab", "trl"),
    ],
)
def test_arms_of_one_objective_agree(ours, theirs, rows):
    shape = replace(SHAPE, rows=rows)
    (value, gradient), (other, wanted) = loss_and_gradient(ours, shape), loss_and_gradient(theirs, shape)
    assert value == pytest.approx(other, rel=1e-5)
    whole = torch.cat([g.flatten() for g in wanted.values()]).norm()
    for name, here in gradient.items():
        torch.testing.assert_close(here, wanted[name], rtol=1e-4, atol=float(1e-5 * whole), msg=name)


@pytest.mark.parametrize("name", ["oprd", "full_vocab", "full_vocab_whole"])
def test_rows_of_a_loss_change_it(name):
    """The paper's rows are the last ones for states and all of them for tokens."""
    values = {rows: loss_and_gradient(name, replace(SHAPE, rows=rows))[0] for rows in arms.ROWS}
    assert values["all"] != values["last"]
    assert values["paper"] == values["last" if name == "oprd" else "all"]


@pytest.mark.parametrize("name", arms.ARMS)
def test_every_arm_measures_and_keeps_nothing(name):
    arm = arms.Arm(name, SHAPE)
    first, second = arm.measure(), arm.measure()
    assert first.keys() == second.keys() == {"seconds", "transient_mb"}
    assert second["seconds"] > 0 and all(p.grad is None for p in arm.student.parameters())


@pytest.mark.parametrize("name", ["bare", "oprd", "oprd_bridge", "top_16_whole", "authors", "trl"])
def test_shapes_hold_what_torch_allocates(name):
    shape = replace(SHAPE, vocabulary=20_001, tokens=200)
    measured = arms.Arm(name, shape).measure()["transient_mb"]
    assert measured > 2.5 and arms.counted_mb(name, shape) == pytest.approx(measured, abs=0.05)


def test_a_sweep_on_shapes(tmp_path, monkeypatch):
    output = tmp_path / "rows.csv"
    monkeypatch.setitem(actor_update.PRESETS, "quick", SHAPE)
    argv = ["actor_update.py", "--preset", "quick", "--vocabulary", "4000", "--shapes", "--sweep", "length"]
    argv += ["--sizes", "128", "4096", "--arms", "oprd", "top_16_whole", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", argv)
    actor_update.main()
    rows = list(csv.DictReader(output.open()))
    assert [(row["tokens"], row["arm"]) for row in rows] == [
        (tokens, arm) for tokens in ("128", "4096") for arm in ("oprd", "top_16_whole")
    ]
    logits = 4 * SHAPE.rollouts * (4096 - 128) * 4000 / 1e6
    held = [float(row["transient_mb"]) for row in rows]
    assert "seconds" not in rows[0] and held[2] - held[0] < 2 * logits < held[3] - held[1]
    assert output.with_suffix(".png").stat().st_size > 5000


@pytest.mark.drill
def test_a_run_in_turn(tmp_path, monkeypatch, capsys):
    """What has no room is not run, and its memory counted."""
    output = tmp_path / "rows.csv"
    argv = ["actor_update.py", "--preset", "quick", "--tokens", "16", "--last", "4", "--vocabulary", "50"]
    argv += ["--repeats", "2", "--arms", "bare", "oprd", "full_vocab_whole", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(actor_update, "fits", lambda arm, shape: arm != "full_vocab_whole")
    actor_update.main()
    rows = list(csv.DictReader(output.open()))
    measured = [(row["arm"], row["repeat"], bool(row["seconds"]), bool(row["transient_mb"])) for row in rows]
    ran = [(arm, repeat, True, True) for arm in ("bare", "oprd") for repeat in "01"]
    assert measured == [*ran, ("full_vocab_whole", "0", False, True)]
    assert {row["vocabulary"] for row in rows} == {"50"} and all(row["hardware"] for row in rows)
    table = capsys.readouterr().out
    assert "| bare |" in table and "1 (1–1)" in table and "| full_vocab_whole |  |" in table


def test_allocations_are_counted_while_they_live():
    kept = []
    with harness.watched_memory() as watched:
        kept.append(torch.ones(1_000_000))
        (torch.ones(2_000_000) * 2).sum()
        kept.append(torch.ones(3_000_000))
    assert harness.peak_mb(watched) == pytest.approx(4 * (1 + 2 + 2), rel=1e-3)
    with harness.watched_memory() as watched:
        kept.clear()
    assert harness.peak_mb(watched) == 0


def test_paired_ratios():
    rows = [
        {"arm": a, "seconds": s}
        for a, s in [("x", 2.0), ("x", 30.0), ("x", 6.0), ("y", 1), ("y", 10), ("y", 2)]
    ]
    above, below = (harness.of_arm(rows, arm, "seconds") for arm in "xy")
    assert harness.paired_ratio(above, below) == (3.0, 2.0, 3.0)
    assert harness.paired_ratio(above, above) == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError):
        harness.paired_ratio(above, below[:2])


def rows_with(**changes):
    costs = {"bare": 1.0, "oprd": 1.0, "oprd_bridge": 1.0, "top_16_whole": 9.0, "full_vocab": 4.0, "trl": 5.0}
    return [
        {"arm": arm, "repeat": repeat, "seconds": cost, "transient_mb": cost}
        for arm, cost in (costs | changes).items()
        for repeat in range(3)
    ]


def test_bounds():
    assert actor_update.check(rows_with()) == []
    assert actor_update.check(rows_with(oprd=1.2)) == [
        "seconds of oprd ÷ bare",
        "transient_mb of oprd ÷ bare",
    ]
    assert actor_update.check(rows_with(top_16_whole=4.0)) == ["transient_mb of top_16_whole ÷ oprd"]
