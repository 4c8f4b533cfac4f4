# Each target does all its own set-up, in .venv.
PYTHON ?= python3
PYTHON_OLDEST ?= python3.10
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: help demo test test-oldest check format clean

help:
	@echo "make demo         the NTK of a small CNN by every route: agreement, times, a picture"
	@echo "make test         format, lint and type checks, then the tests"
	@echo "make test-oldest  the tests with the oldest Python and torch that setup.cfg allows"
	@echo "make check        format, lint and type checks alone"
	@echo "make format       format the code"
	@echo "make clean        remove .venv and what the tools left"

$(INSTALLED): setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[test,lint]"
	touch $@

demo: $(INSTALLED)
	$(BIN)/python -m ggn_ntk

test: check
	$(BIN)/python -m pytest

test-oldest:
	$(PYTHON_OLDEST) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet torch==2.6.0 torchvision==0.21.0 --editable ".[test]"
	.venv-oldest/bin/python -m pytest

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .venv-oldest build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
