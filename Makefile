# One entry point for people and continuous integration; `make help` lists it.
VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: help test test-fast lint format
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

$(STAMP): pyproject.toml setup.py
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q uv
	$(VENV)/bin/uv pip install -q --python $(PY) "setuptools>=77" "cmake>=3.25" "ninja>=1.11" "pybind11>=2.13"
	$(VENV)/bin/uv pip install --python $(PY) --no-build-isolation -e ".[sglang,train,demo,dev]"
	touch $@

test: $(STAMP)  ## run every test
	$(PY) -m pytest

test-fast: $(STAMP)  ## run the tests that need no engine
	$(PY) -m pytest -m "not slow"

lint: $(STAMP)  ## format and lint checks, types
	$(VENV)/bin/ruff format --check python tests bench setup.py
	$(VENV)/bin/ruff check python tests bench setup.py
	$(VENV)/bin/mypy
