# Every command that a contributor or the continuous integration needs; `make` alone lists them.

PYTHON ?= python3
# Where to look for torch besides PyPI. PyPI's Linux build brings CUDA (gigabytes); a small CPU build comes with
#   TORCH_INDEX=https://download.pytorch.org/whl/cpu make setup
TORCH_INDEX ?=

BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP) ## create .venv and install dsv3 with its development tools, at the versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "dsv3 needs Python 3.11 or newer, which '$(PYTHON)' is not; name one: make setup PYTHON=python3.12" >&2; \
		exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup ## train a tiny DeepSeek-V3 on this machine's CPU, then let it speak
	$(BIN)/dsv3 demo

test: lint ## everything that must pass: lint, types, tests
	$(BIN)/python -m pytest

lint: setup ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## put the code into the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## measure against peers: every benchmarks/bench_*.py
	@set -e; for script in benchmarks/bench_*.py; do echo "== $$script"; $(BIN)/python $$script; done

clean: ## remove the environment, caches and builds; runs in out/ stay
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
