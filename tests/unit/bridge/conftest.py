"""What every test of the fit does: NumPy rows in, in chunks, and a bridge out."""

import numpy as np
import pytest
import torch

from oprd.bridge import BridgeFitter
from oprd.models.tiny import task
from oprd.objective.selection import LayerMap


@pytest.fixture(scope="session")
def filled():
    """`filled(student, teacher, ids=None, sizes=None, dtype=float64, **options)`: a fitter of layers 1=1."""

    def fill(student, teacher, ids=None, sizes=None, dtype=torch.float64, **options):
        fitter = BridgeFitter(LayerMap(((1, 1),)), **options)
        cuts = np.cumsum(sizes)[:-1] if sizes else []
        chunks = [None] if ids is None else np.split(np.asarray(ids), cuts)
        for i, (s, t) in enumerate(zip(np.split(student, cuts), np.split(teacher, cuts), strict=True)):
            s, t = (torch.from_numpy(np.ascontiguousarray(x)).to(dtype) for x in (s, t))
            fitter.update({1: s}, {1: t}, None if ids is None else chunks[i])
        return fitter

    return fill


@pytest.fixture(scope="session")
def fit(filled):
    """`fit(student, teacher, rank, …)`: the bridge of those rows."""
    return lambda student, teacher, rank, **options: filled(student, teacher, **options).fit(rank)


@pytest.fixture(scope="module", autouse=True)
def all_problems():
    """Fits on few rows hang on which prompts are drawn, and other processes draw from all."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(task, "NUM_TRAIN_PROBLEMS", 8192)
        yield
