# make demo and make test do all the set-up by themselves, on a machine with Python 3.11 or newer.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed-by-make

DEMO_FILES := demo-output .demo-output.llmopt-staging $(wildcard demo-output.quarantine*)

# Of one check of the shipped kernels. Both are to take six minutes on two processors, 360 s each;
# half as much again is for slower processors.
AOT_CPU_SECONDS := 540

export PYTHONHASHSEED := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help install demo test check fix interop planted \
  kernels-aot kernels-aot-full kernels-oldest clean

help: ## say what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 18

install: $(STAMP) ## set up .venv with everything that the other targets need

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "llmopt needs Python 3.11 or newer, and '$(PYTHON)' is not: $$($(PYTHON) --version 2>&1)"; \
	  echo "Name another one, for example: make $(or $(MAKECMDGOALS),demo) PYTHON=python3.12"; \
	  exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@echo "installing torch, then llmopt with its development tools; this takes some minutes ..."
	@$(BIN)/pip install --quiet --constraint constraints.txt torch
	@$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP) ## quantize the built-in model to INT4, measure it, publish or refuse it
	@rm -rf $(DEMO_FILES)
	$(BIN)/llmopt demo -o demo-output

test: $(STAMP) ## run the tests (interop apart)
	$(BIN)/python -m pytest -q --numprocesses auto --maxprocesses 4 --dist worksteal --durations 10

check: $(STAMP) ## lint, formatting, types, import rules, file sizes; only reads
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python .ci/file_sizes.py

fix: $(STAMP) ## lint and format what can be mended by machine
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

interop: $(STAMP) ## open outputs with their consumers, each in an environment of its own
	$(BIN)/python tests/environments.py
	$(BIN)/python -m pytest -q -rs -m interop tests/interop --durations 10

planted: $(STAMP) ## plant faults in sound artifacts and see that the gate refuses them (long)
	$(BIN)/python -m pytest -q -m planted tests/planted_faults --durations 10

kernels-aot: $(STAMP) ## compile the shipped kernels for GPUs that need not be here, check what they use
	$(BIN)/python kernels/aot/check.py --cpu-budget $(AOT_CPU_SECONDS)
	$(BIN)/python kernels/aot/with_oldest_triton.py kernels/aot/check.py --cpu-budget $(AOT_CPU_SECONDS)

kernels-aot-full: $(STAMP) ## the same for every tuning candidate, and for AMD's gfx942 (long)
	$(BIN)/python kernels/aot/check.py --all --chip 80 --chip 90
	$(BIN)/python kernels/aot/check.py --chip gfx942

kernels-oldest: $(STAMP) ## run the kernels' tests with the oldest triton
	$(BIN)/python kernels/aot/with_oldest_triton.py -m pytest -q -p no:cacheprovider \
	  -W ignore::RuntimeWarning -W ignore::DeprecationWarning \
	  tests/kernels --ignore tests/kernels/benchmarks

clean: ## remove what make and the tools made, .venv included
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache \
	  dist build $(DEMO_FILES)
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
