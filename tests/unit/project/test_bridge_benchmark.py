"""The benchmark of the bridge's fit runs, and the exact fit is no worse than a short training."""

import importlib.util
import math

import pytest

from places import BENCHMARKS

SCRIPT = BENCHMARKS / "bridge_fit.py"


@pytest.mark.slow
def test_the_exact_fit_is_no_worse_than_training():
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    records = benchmark.run(rollouts=48, epochs=2, ranks=(4,))
    mse = {record["arm"]: record["held_out_mse"] for record in records}
    assert set(mse) == {"exact", "exact, affine", "lstsq", "paper", "cached", "joint"}
    assert all(math.isfinite(value) and value > 0 for value in mse.values())
    assert mse["exact"] == pytest.approx(mse["lstsq"], rel=1e-3)
    assert mse["exact"] < min(mse["paper"], mse["cached"], mse["joint"])
    assert mse["paper"] == pytest.approx(mse["cached"], rel=1e-3)
