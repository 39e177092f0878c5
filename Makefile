# Every target creates the environment it needs, and may be run again.
SHELL := /bin/bash
ENVIRONMENT := .venv
PYTHON := $(ENVIRONMENT)/bin/python
INSTALLED := $(ENVIRONMENT)/installed
TPU_COMPILER := $(ENVIRONMENT)/tpu-compiler
PIP := $(PYTHON) -m pip install --quiet --disable-pip-version-check

.PHONY: help train test lint format clean

help:  ## List the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(INSTALLED): pyproject.toml
	@python3 -c 'import sys; sys.exit(0 if sys.version_info >= (3, 12) else f"Python >= 3.12 is needed, python3 is {sys.version.split()[0]}")'
	python3 -m venv $(ENVIRONMENT)
	$(PIP) --editable '.[dev]'
	@touch $(INSTALLED)

# Kernels and training steps are compiled for TPUs that aren't there; where there is no such compiler those tests skip.
$(TPU_COMPILER): $(INSTALLED)
	$(PIP) --editable '.[tpu]' || echo "no TPU compiler for this machine: its tests will be skipped"
	@touch $(TPU_COMPILER)

train: $(INSTALLED)  ## Train the tiny model with ZeCO on 8 virtual devices; run again to resume
	$(PYTHON) -m experiments.train $(ARGS)

test: $(INSTALLED) $(TPU_COMPILER)  ## Run the lint and every test that this machine can run
	$(ENVIRONMENT)/bin/ruff check .
	$(ENVIRONMENT)/bin/ruff format --check .
	$(PYTHON) -m pytest --numprocesses auto --dist loadfile $(ARGS)

lint: $(INSTALLED)  ## Check style
	$(ENVIRONMENT)/bin/ruff check .
	$(ENVIRONMENT)/bin/ruff format --check .

format: $(INSTALLED)  ## Format the code
	$(ENVIRONMENT)/bin/ruff format .
	$(ENVIRONMENT)/bin/ruff check --fix .

clean:  ## Remove the environment and what runs left behind
	rm -rf $(ENVIRONMENT) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
