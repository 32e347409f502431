# Every target makes its own environment in .venv first; nothing is needed but Python 3.11, pip and
# make. Running a target twice is cheap: packages are installed again only when pyproject.toml or
# constraints.txt has changed.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
PYTHON := $(VENV)/bin/python
PIP := $(PYTHON) -m pip --disable-pip-version-check install -qq -c constraints.txt
BASE_PYTHON ?= $(shell command -v python3.11 || command -v python3)

# Two test processes with one thread each; no test asks a model hub for anything.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.PHONY: help demo test lint docs bench bench-gpu simulate clean

help: ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1\t\2/p' Makefile | expand -t 12

demo: $(VENV)/.installed ## run the quickstart sweep; prints its table and the report's path
	$(VENV)/bin/palimpsest sweep sweeps/quickstart.yaml

test: lint ## everything that must pass: lint, then the tests
	$(TEST_ENV) $(PYTHON) -m pytest -n 2

lint: $(VENV)/.installed ## style, format, types, and the walls between the rooms
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

docs: $(VENV)/.installed-docs ## build the documentation into site/, warnings are errors
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

bench: $(VENV)/.installed ## time the phases that matter; COUNTERFACT=file, THREADS=1, ONLY=probes
	$(PYTHON) -m benchmarks.bench $(if $(COUNTERFACT),--counterfact $(COUNTERFACT)) \
	    $(if $(THREADS),--threads $(THREADS)) $(if $(ONLY),--only $(ONLY))
	$(if $(ONLY),,$(PYTHON) -m benchmarks.report)

simulate: $(VENV)/.installed ## how often the intervals hold the truth: the tables of docs/statistics.md
	$(PYTHON) -m benchmarks.simulate

bench-gpu: $(VENV)/.installed ## seconds per edit on a GPU at the sizes of GPT-2 XL and GPT-J
	$(PYTHON) -m benchmarks.gpu

clean: ## remove the environment and all that was built; results/ stays
	rm -rf $(VENV) site build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -rf .import_linter_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(PYTHON):
	@$(BASE_PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
	    f"expected Python 3.11 or newer, found {sys.version.split()[0]}; set BASE_PYTHON")'
	$(BASE_PYTHON) -m venv $(VENV)

# torch goes first and alone: at exactly the pinned version pip takes the CPU build if it sees one.
$(VENV)/.installed: pyproject.toml constraints.txt | $(PYTHON)
	$(PIP) torch
	$(PIP) -e '.[dev]'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) -e '.[docs]'
	@touch $@
