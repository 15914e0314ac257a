# Thin aliases. Everything they call can be called by hand from an activated .venv.
PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
.PHONY: repro check test mutants smoke site serve lab bench peers lock
.DEFAULT_GOAL := repro

.venv/installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Trimtab needs Python >= 3.11; try: make PYTHON=python3.12"'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --editable .
	touch $@

repro: .venv/installed        ## rebuild every result at the scale that params.yaml holds
	trimtab check
	dvc repro || { trimtab why; exit 1; }

check: .venv/installed        ## ruff, types, and the tests that need neither a model nor the pipeline, within three minutes
	ruff check .
	ruff format --check .
	mypy
	OMP_NUM_THREADS=1 pytest --quiet --override-ini addopts=--strict-markers -m "not heavy and not pipeline and not after_pipeline"

.venv/tested: .venv/installed  # a GPU build of torch has brought its Triton; without one the kernels' tests interpret it
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/pip install --quiet --no-deps triton==3.7.1
	touch $@

test: .venv/tested .venv-peers/installed  ## every check, the pipeline at the smoke scale among them
	ruff check .
	ruff format --check .
	OMP_NUM_THREADS=1 pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

smoke: .venv/installed        ## the whole pipeline at the smoke scale, in a copy under scratch/smoke
	trimtab copy scratch/smoke --scale smoke
	cd scratch/smoke && dvc repro

site: .venv/installed         ## the records as a static site, in site/
	trimtab site

serve: site                   ## the same on http://localhost:8000, for this machine alone
	python -m http.server --bind 127.0.0.1 --directory site 8000

lab: .venv/installed          ## JupyterLab, opened where to start; commits leave outputs of source notebooks out
	-pre-commit install
	jupyter labextension disable --level=sys_prefix @jupyterlab/apputils-extension:announcements  # they ask the network
	jupyter lab --LabApp.default_url=/lab/tree/notebooks/explore/start.ipynb

bench: .venv/installed .venv-peers/installed        ## side-by-side measurements; each writes the CSV beside it
	for script in benchmarks/*.py; do python $$script || exit 1; done

.venv-peers/installed: benchmarks/peers.txt
.venv-mutants/installed: tests/mutants.txt
.venv-%/installed: .venv/installed  # other libraries, over what .venv has
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install --quiet --no-deps --requirement $(filter %.txt,$^)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$(.venv-$*/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/trimtab.pth"
	touch $@

mutants: .venv/tested .venv-mutants/installed  ## break the library on purpose, and list what no test notices (an hour or two)
	.venv-mutants/bin/python tests/mutants.py

peers: .venv-peers/installed  ## other libraries, for the exchange tests and the benchmarks

lock: .venv/installed         ## resolve pyproject.toml anew
	uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --no-header --no-annotate --output-file requirements.lock
