"""Steps without a row to learn from: told once with their cause, counted, refused if they were all."""

import pytest

from oprd.objective.settings import ObjectiveSettings
from oprd.training.supervision import SupervisionWatch

FULL = {"rollout/mean_length": 8.0, "rollout/truncated_share": 1.0, "rollout/representation_rows": 6.0}
EMPTY = FULL | {"rollout/representation_rows": 0.0}


def watch(**settings):
    return SupervisionWatch(ObjectiveSettings(representation_loss="mse", **settings))


@pytest.mark.parametrize(
    ("settings", "values", "cause"),
    [
        ({"mask_truncated_completions": True}, {}, "mask_truncated_completions leaves those out"),
        ({"mask_truncated_completions": True}, {"rollout/mean_length": 0.0}, "all responses are empty"),
        ({}, {"rollout/coverage": 0.0}, "0% of the student's rows are paired"),
        ({}, {}, "beyond the vocabulary"),
    ],
)
def test_the_first_empty_step_is_told_with_its_cause(caplog, settings, values, cause):
    here = watch(**settings)
    for step in (1, 2, 3):
        here.observe(step, EMPTY | values)
    (message,) = caplog.messages
    assert message.startswith("step 1: the representation term had no row") and cause in message


def test_ten_empty_steps_in_a_row_are_told_again(caplog):
    here = watch()
    for step in range(1, 32):
        here.observe(step, FULL if step in (1, 7, 20) else EMPTY)
    assert [message.partition(":")[0] for message in caplog.messages] == ["step 2", "step 17", "step 30"]
    assert "in 10 steps" in caplog.messages[1]


def test_a_run_that_supervised_nothing_is_a_fault(caplog):
    here = watch()
    here.resume([{"step": 1} | EMPTY])
    here.observe(2, EMPTY)
    with pytest.raises(RuntimeError, match="no step supervised anything"):
        here.check()
    here.observe(3, FULL)
    here.check()
    caplog.clear()
    here.tell()
    assert caplog.messages == ["2 of 3 steps supervised nothing"]


def test_steps_without_an_active_term_do_not_count(caplog):
    here = watch(representation_weight="0=1,1=0", output_loss="sampled_token", output_weight="0=0,1=0,2=1")
    both = {"rollout/output_rows": 0.0}
    here.observe(1, FULL | both)  # the output term is off
    here.observe(2, EMPTY | both)  # both are
    assert not caplog.messages
    here.observe(3, FULL | both)
    assert len(caplog.messages) == 1 and "the output term" in caplog.messages[0]
    caplog.clear()
    here.tell()
    assert caplog.messages == ["1 of 2 steps supervised nothing"]


def test_steps_of_given_rollouts_say_nothing(caplog):
    here = watch()
    here.observe(1, {"loss/total": 1.0})
    here.check()
    here.tell()
    assert not caplog.messages
