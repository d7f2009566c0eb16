PYTHON ?= python3
BIN := .venv/bin
TORCH := torch==2.13.0

.PHONY: demo test drill bench-quick clean

demo: .venv/ready
	$(BIN)/oprd demo

test: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# Kills and starves real runs for about ten minutes; DRILL_SEED=n repeats the random moments of another drill.
drill: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m drill -n 2 tests/drill

# Ratios of one run on a small shape, in three minutes; the figures of record: benchmarks/actor_update.py.
bench-quick: .venv/ready
	$(BIN)/python benchmarks/actor_update.py --preset quick --repeats 7 --check --output runs/bench-quick.csv \
		--arms bare oprd oprd_bridge full_vocab top_16_whole trl

# torch comes first and alone: resolved together with the rest, pip would take a CUDA build.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch .venv/ready

clean:
	rm -rf .venv runs build dist
