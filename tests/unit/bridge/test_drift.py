"""When a run is told that its student has left the bridge behind, and what is logged meanwhile."""

import logging

import pytest
import torch

from oprd.bridge import Bridge
from oprd.bridge.artifact import Projector
from oprd.bridge.drift import MARGIN, WINDOW, DriftMonitor


def monitor(*levels, layers=None, rank=2, curve=None):
    """A monitor of layers 1, 2, … whose held-out cosines are `levels`."""
    reports = {str(i): {"cosine_at_rank": level, "cosine": curve} for i, level in enumerate(levels, 1)}
    ranks = {i: Projector(i, *(torch.ones(s) for s in ((2, 3), (2,), (2, 3), (3,)))) for i in range(1, 4)}
    return DriftMonitor(Bridge(ranks, {"layers": reports}).first(rank), layers or range(1, len(levels) + 1))


def feed(monitor, cosines, first=1):
    """Observe one step per cosine (None: a step without one); returns what is logged."""
    steps = enumerate(cosines, first)
    return [monitor.observe(step, {} if c is None else {"representation/cosine": c}) for step, c in steps]


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def test_constants():
    assert (WINDOW, MARGIN) == (10, 0.01)


def test_logs_the_running_mean_beside_the_level():
    cosines = [0.1 * i for i in range(1, 15)]
    logged = feed(monitor(0.5, 0.7), cosines)
    for end, values in enumerate(logged, 1):
        window = cosines[max(0, end - 10) : end]
        assert values == {
            "bridge/alignment": pytest.approx(sum(window) / len(window)),
            "bridge/held_out_alignment": pytest.approx(0.6),
        }


def test_the_level_is_that_of_the_compared_layers():
    (values,) = feed(monitor(0.5, 0.7, 0.9, layers=(1, 3)), [0.2])
    assert values["bridge/held_out_alignment"] == pytest.approx(0.7)


def test_no_warning_before_the_window_is_full(caplog):
    low = monitor(0.9)
    feed(low, [-1.0] * 9)
    assert not warnings(caplog)
    feed(low, [-1.0], first=10)
    (said,) = warnings(caplog)
    assert said.startswith("step 10: through the bridge, fresh rollouts have cosine -1.000, below the 0.900")


def test_steps_without_a_cosine_do_not_count(caplog):
    low = monitor(0.9)
    logged = feed(low, [-1.0] * 9 + [None] * 5)
    assert logged[9:] == [{}] * 5 and not warnings(caplog)
    feed(low, [-1.0], first=15)
    assert len(warnings(caplog)) == 1


@pytest.mark.parametrize(("mean", "warned"), [(0.91, 0), (0.9, 0), (0.8905, 0), (0.8895, 1), (0.5, 1)])
def test_the_mean_may_be_below_the_level_by_the_margin(caplog, mean, warned):
    feed(monitor(0.9), [mean + 0.05, mean - 0.05] * 5)
    assert len(warnings(caplog)) == warned


def test_warns_again_only_after_a_recovery(caplog):
    drifting = monitor(0.9)
    feed(drifting, [0.5] * 30)
    assert len(warnings(caplog)) == 1
    feed(drifting, [1.0] * 10, first=31)  # the mean passes 0.89 again within these
    assert len(warnings(caplog)) == 1
    feed(drifting, [0.5] * 30, first=41)
    assert len(warnings(caplog)) == 2 and warnings(caplog)[1].startswith("step 43: ")


@pytest.mark.parametrize("levels", [(None,), (0.9, None), ()])
def test_silent_without_a_level(caplog, levels):
    assert feed(monitor(*levels, layers=(1, 2)), [-1.0] * 20) == [{}] * 20
    assert not warnings(caplog)


def test_silent_for_a_bridge_without_a_report(caplog):
    assert feed(DriftMonitor(Bridge({}), (1,)), [-1.0] * 20) == [{}] * 20
    assert not warnings(caplog)


def test_the_level_of_a_cut_bridge_is_that_of_its_rank():
    """A bridge of rank 2, used at rank 1: the held-out cosine of the first direction alone."""
    (values,) = feed(monitor(0.5, rank=1, curve=[0.8, 0.5, 0.4]), [0.2])
    assert values["bridge/held_out_alignment"] == pytest.approx(0.8)
