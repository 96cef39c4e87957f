# Every target sets up .venv first, so on a fresh clone any of them just works. Needed: make,
# Python 3.11 or later with venv, and a C compiler (torch.compile uses one in the tests).

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format bench policies clean

VENV := .venv
READY := $(VENV)/.ready
PYTHON := $(VENV)/bin/python
TYPED := moegen backends examples benchmarks

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## Make .venv with moegen and its tools (every target below does so by itself)

demo: $(READY) ## Compile specs/tiny.yaml and train what comes out, 4 minutes on 2 cores
	$(PYTHON) -m examples.train_tiny

# As many processes as cores, so each with one thread: more would wait for one another.
test: lint ## Run ruff, mypy and all tests
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n auto

lint: $(READY) ## Run ruff and mypy
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy $(TYPED)

format: $(READY) ## Let ruff format and repair
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

bench: $(READY) ## Measure compile times, and a routed layer against transformers
	$(PYTHON) benchmarks/compile_times.py
	$(PYTHON) -m benchmarks.moe_layer --cpu --aims

policies: $(READY) ## Train every routing policy on real text, 10 to 20 minutes
	$(PYTHON) -m benchmarks.policies

clean: ## Remove .venv, caches and generated models
	rm -rf $(VENV) generated .mypy_cache .ruff_cache .pytest_cache .hypothesis

# A candidate must run (a shim may not), be new enough, and be able to make environments.
CHECK := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))

$(READY): pyproject.toml constraints.txt
	@if ! $(PYTHON) -c '$(CHECK)' 2>/dev/null; then \
	  for found in python3.11 python3.12 python3.13 python3.14 python3 python none; do \
	    if $$found -c '$(CHECK)' >/dev/null 2>&1; then break; fi; \
	  done; \
	  if [ $$found = none ]; then \
	    echo 'No Python 3.11 or later with venv and ensurepip was found on PATH.' >&2; \
	    echo 'Install one (on Debian and Ubuntu: python3 and python3-venv) and try again.' >&2; \
	    exit 1; \
	  fi; \
	  echo "Making $(VENV) with $$($$found --version)"; \
	  $$found -m venv --clear $(VENV); \
	fi
	@echo 'Installing moegen and its tools (this downloads PyTorch the first time)'
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
