# Thin aliases. Everything they call can be called by hand from an activated .venv.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
.PHONY: repro test smoke lab bench lock
.DEFAULT_GOAL := repro

.venv/installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Trimtab needs Python >= 3.11; try: make PYTHON=python3.12"'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --editable .
	touch $@

repro: .venv/installed        ## rebuild every result at the scale that params.yaml holds
	dvc repro

test: .venv/installed         ## every check, the pipeline at the smoke scale among them
	ruff check .
	ruff format --check .
	mypy
	pytest

smoke: .venv/installed        ## the whole pipeline at the smoke scale, in a copy under scratch/smoke
	trimtab copy scratch/smoke --scale smoke
	cd scratch/smoke && dvc repro

lab: .venv/installed          ## JupyterLab on the notebooks
	jupyter lab

bench: .venv/installed        ## side-by-side measurements; each writes the CSV beside it
	for script in benchmarks/*.py; do python $$script || exit 1; done

lock: .venv/installed         ## resolve pyproject.toml anew
	uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --no-header --no-annotate --output-file requirements.lock
