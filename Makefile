# Two commands do everything on a fresh machine: `make run` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Modules whose lines and branches the tests must reach completely.
COMPLETE := methods aggregation records admission checkpoint

.DEFAULT_GOAL := help
.PHONY: help install run test test-slow check format bench pretrain pretrain-dense pretrain-llama-moe pretrain-deepseek pretrain-vision clean

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

# One thread per test process: several processes with several threads each halt one another on small machines. Only the
# modules above are traced: tracing all of them takes time.
test: $(STAMP) ## the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(COMPLETE:%=--cov=emberfed.%) --cov-report=

test-slow: $(STAMP) ## tests that `make test` leaves out: more kills, more memory measured in processes of their own
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m slow

check: $(STAMP) ## what continuous integration runs: formatting, lint, types, tests with coverage
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test
	$(BIN)/coverage report --show-missing --fail-under=100

format: $(STAMP) ## format and mend what ruff can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP) ## benchmarks: routed LoRA against PEFT; the sparse adapter against dense ones; aggregation against copies and SVD; memory (about 40 minutes)
	$(BIN)/python -m benchmarks

pretrain: $(STAMP) ## make the built-in model again (about ten minutes on one core)
	$(BIN)/python -m emberfed.builtin.pretrain --output build/model

pretrain-dense: $(STAMP) ## make a small dense LLaMA on the built-in text (about six minutes on one free core)
	$(BIN)/python -m emberfed.builtin.pretrain --family llama --output models/world-llama

pretrain-llama-moe: $(STAMP) ## make that LLaMA sparse and train it further (pretrain-dense first; about ten minutes on a shared core)
	$(BIN)/python -m emberfed.builtin.pretrain --family llama-moe --output models/world-llama-moe

pretrain-deepseek: $(STAMP) ## make a small DeepSeek-V2 with shared experts on the built-in text (about sixteen minutes on a shared core)
	$(BIN)/python -m emberfed.builtin.pretrain --family deepseek --output models/world-deepseek

pretrain-vision: $(STAMP) ## make the built-in vision model again (about four minutes on one core)
	$(BIN)/python -m emberfed.builtin.pretrain_vision --output build/vision_model

clean: ## remove the environment and what tools left behind
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
