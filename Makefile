# Two commands do everything on a fresh machine: `make run` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUNS := runs

.DEFAULT_GOAL := help
.PHONY: help install run test check format bench pretrain clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1|/' | column -t -s '|'

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $(STAMP)

install: $(STAMP) ## install into .venv, versions as in constraints.txt

run: $(STAMP) ## the quickstart: federated fine-tuning of the built-in model on its built-in data, about two minutes
	$(BIN)/emberfed run

test: $(STAMP) ## all tests but the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

check: $(STAMP) ## what continuous integration runs: formatting, lint, types, tests with coverage
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test
	$(BIN)/python tests/coverage_gate.py

format: $(STAMP) ## format and mend what ruff can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP) ## benchmarks: memory with 8 and 64 clients, time outside training
	$(BIN)/python -m benchmarks

pretrain: $(STAMP) ## make the built-in model again (about half an hour on two cores)
	$(BIN)/python -m emberfed.builtin.pretrain --output build/model

clean: ## remove the environment and what tools left behind
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
