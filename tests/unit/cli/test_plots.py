"""What is drawn of runs: a run that lies in two folders is one, and its layers are rows of a heatmap."""

import json

import numpy as np
import pytest

from oprd.cli.plots import cosines_by_layer, layers_figure


@pytest.fixture
def folders(tmp_path):
    """Three steps with layers 2 and 12 at the first and last, and two more steps in a second folder."""
    written = []
    for name, steps in (
        ("first", [{2: 0.5, 12: 0.25}, {}, {2: 0.75, 12: 0.5}]),
        ("second", [{}, {2: 1.0, 12: 0.75}]),
    ):
        folder = tmp_path / name
        folder.mkdir()
        lines = [
            {"step": step} | {f"representation/cosine_layer_{layer}": value for layer, value in found.items()}
            for step, found in enumerate(steps, 1)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        written.append(folder)
    return written


def test_cosines_go_on_in_the_next_folder(folders):
    assert cosines_by_layer(folders) == {
        1: {2: 0.5, 12: 0.25},
        3: {2: 0.75, 12: 0.5},
        5: {2: 1.0, 12: 0.75},
    }


def test_layers_rise_and_runs_share_their_colours(folders):
    figure = layers_figure({"whole": cosines_by_layer(folders), "part": {2: {12: 0.0}}})
    whole, part = (axes.images[0] for axes in figure.axes[:2])
    np.testing.assert_equal(np.asarray(whole.get_array()), [[0.5, 0.75, 1.0], [0.25, 0.5, 0.75]])
    assert whole.get_clim() == part.get_clim() == (0.0, 1.0)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["2", "12"]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["1", "3", "5"]
