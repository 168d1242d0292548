# `make train` and `make test` do all the set-up that a fresh machine with Python lacks.
#
#   PYTHON=python3.12   which Python makes .venv
#   VENV=               set empty, the environment that is active is used as it is
#   CONFIG, ARGS        what `make train` trains: make train CONFIG=my.yaml ARGS="train.steps=10"

PYTHON ?= python3
VENV ?= .venv
CONFIG ?= tiny-cpu
ARGS ?=
# Three workers are right for two cores: tests of several processes wait for each other half of their time.
# `PYTEST_ARGS=-n0` runs one by one.
PYTEST_ARGS ?= -n 3 --dist loadfile

ifeq ($(strip $(VENV)),)
BIN :=
READY :=
else
BIN := $(VENV)/bin/
READY := $(VENV)/.ready
endif

.PHONY: train test lint format clean

train: $(READY)
	$(BIN)longseq train $(CONFIG) $(ARGS)

test: $(READY)
	$(BIN)python -m pytest $(PYTEST_ARGS)

lint: $(READY)
	$(BIN)ruff check .
	$(BIN)ruff format --check .

format: $(READY)
	$(BIN)ruff check --fix .
	$(BIN)ruff format .

clean:
	rm -rf .venv build dist longseq.egg-info .pytest_cache .ruff_cache

# torch first, by its pin: DeepSpeed's set-up looks at it, and no later package may bring another.
$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt torch setuptools
	DS_BUILD_OPS=0 $(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@
