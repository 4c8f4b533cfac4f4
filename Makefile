# Each target does all its own set-up, in .venv.
PYTHON ?= python3
PYTHON_OLDEST ?= python3.10
PYTHON_JAX ?= $(PYTHON)
BIN := .venv/bin
INSTALLED := .venv/.installed
INSTALLED_DOCS := .venv/.installed-docs
INSTALLED_DIST := .venv/.installed-dist
INSTALLED_PEERS := .venv/.installed-peers
INSTALLED_JAX := .venv-jax/.installed

.PHONY: help demo test test-oldest check format docs benchmark figures dist clean

help:
	@echo "make demo         the NTK of a small CNN by every route: agreement, times, a picture"
	@echo "make test         format, lint, type and layer checks, then the tests"
	@echo "make test-oldest  the tests with the oldest Python and torch that setup.cfg allows"
	@echo "make check        format, lint, type and layer checks, and the private parts of torch that are relied on"
	@echo "make format       format the code"
	@echo "make docs         the documentation and the gallery, in docs/_build/html, for any static host"
	@echo "make benchmark    ggn_ntk beside its peers: tables and plots in docs/benchmarks, on a quiet machine"
	@echo "                  (PYTHON_JAX=python3.11 for neural-tangents, which needs Python 3.9 to 3.12)"
	@echo "make figures      the numbers of the README and of the pages, and its pictures, from docs/benchmarks"
	@echo "make dist         wheel and sdist in dist/, checked, and tried in an environment of their own"
	@echo "make clean        remove .venv and what the tools left"

$(INSTALLED): setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[test,lint]"
	touch $@

demo: $(INSTALLED)
	$(BIN)/python -m ggn_ntk

test: check
	$(BIN)/python -m pytest -n auto --durations=20

test-oldest:
	$(PYTHON_OLDEST) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet torch==2.6.0 torchvision==0.21.0 --editable ".[test]"
	.venv-oldest/bin/python -m pytest -n auto

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest --quiet tests/process/test_internals.py

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(INSTALLED_DOCS): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	touch $@

docs: $(INSTALLED_DOCS)
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --nitpicky --quiet docs docs/_build/html
	$(BIN)/python docs/check_site.py docs/_build/html

figures: $(INSTALLED)
	$(BIN)/python -m benchmarks.figures
	$(BIN)/python -m benchmarks.pictures

$(INSTALLED_DIST): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable ".[dist]"
	touch $@

dist: $(INSTALLED_DIST)
	rm -rf dist build/lib
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/cffconvert --validate --infile CITATION.cff
	$(BIN)/python .ci/try_wheel.py dist

$(INSTALLED_PEERS): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable ".[benchmark]"
	touch $@

# neural-tangents runs with this version of jax and not with the current one
$(INSTALLED_JAX):
	$(PYTHON_JAX) -m venv .venv-jax
	.venv-jax/bin/python -m pip install --quiet neural-tangents==0.6.5 jax==0.4.23 jaxlib==0.4.23 "numpy<2" "scipy<1.13"
	touch $@

benchmark: $(INSTALLED_PEERS) $(INSTALLED_JAX)
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv .venv-oldest .venv-jax build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis docs/_build docs/gallery
