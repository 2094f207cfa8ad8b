# Each target makes what it needs, the virtual environment included. Needs Python 3.11+ and make, nothing else.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin
READY = $(VENV)/.ready

.PHONY: demo test check bench clean
.DELETE_ON_ERROR:

$(READY): pyproject.toml setup.cfg
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

demo: $(READY)  ## two FSDP2 ranks train and export, are killed, come back and end as Hugging Face directories
	$(BIN)/python examples/demo.py $(DEMO_ARGS)

test: $(READY)  ## every test
	$(BIN)/python -m pytest $(TEST_ARGS)

check: $(READY)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)  ## us and what a user would pick instead, side by side (BENCH_ARGS="--parameters 700M --shards 4")
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info demo-run
