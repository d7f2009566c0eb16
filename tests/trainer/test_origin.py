"""Whether the user is told that two models do not share their coordinates."""

import pytest

from oprd.training.origin import warn_of_another_origin


@pytest.mark.parametrize(
    ("step", "cosine", "warns"),
    [(1, -0.04, True), (1, 0.1, True), (1, 0.3, False), (1, 0.8, False), (2, -0.04, False), (1, None, False)],
)
def test_strangers_are_told_at_the_first_step(caplog, step, cosine, warns):
    values = {} if cosine is None else {"representation/cosine": cosine}
    assert warn_of_another_origin(step, values) == {}
    assert ("do not share their coordinates" in caplog.text) is warns
