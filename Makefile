# Every target does its own set-up: a virtual environment in .venv, installed under the pins of constraints.txt.
# Needed: make, and Python 3.11 or newer with venv. To choose another one: make PYTHON=/path/to/python3.12 test
#
# pip's configuration is respected (pip.conf, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS). If it offers a CPU build of the pinned torch, pip
# installs that; otherwise on Linux the CUDA build of the same version, which is several gigabytes.

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-fast lint types clean

# The first interpreter that starts, is new enough and has venv.
PYTHON ?= $(shell for python in python3.11 python3 python3.12 python3.13; do \
	if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	then echo "$$python"; break; fi; done)
PIP_INSTALL := .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Two processes of one thread each (tests/conftest.py): with models of this size, twice as fast as one of two threads.
# What a file sets up is used by the whole file, so a file stays in one process.
PYTEST = .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

help:
	@echo 'make quickstart   fine-tune the built-in model on handwritten digits, merge, report; the run is runs/quickstart'
	@echo '                  repeated, it resumes; rm -r runs/quickstart to start over'
	@echo 'make test         ruff, mypy and the whole test suite'
	@echo 'make test-fast    the tests without the slow ones'
	@echo 'make lint         ruff check and ruff format --check'
	@echo 'make types        mypy'
	@echo 'make clean        remove caches and build products (runs/, data/ and .venv stay)'

# Repeated after Ctrl-C, it resumes: eval.json is the last file that `mmtune data digits` writes, and merged/ the last folder of the
# run. --resume continues a stopped run and leaves a finished one unchanged.
quickstart: .venv/.installed
	@if [ -e data/digits/eval.json ]; then echo 'data/digits is already there'; \
	else set -x; .venv/bin/mmtune data digits data/digits; fi
	@how=; if [ -e runs/quickstart ]; then how=--resume; fi; \
	set -x; .venv/bin/mmtune train recipes/quickstart.yaml $$how
	.venv/bin/mmtune merge runs/quickstart runs/quickstart/merged --overwrite
	.venv/bin/mmtune report runs/quickstart

test: lint types
	$(PYTEST)

test-fast: .venv/.installed-dev
	$(PYTEST) -m 'not slow'

lint: .venv/.installed-dev
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .

types: .venv/.installed-dev
	.venv/bin/python -m mypy

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

# ---- set-up: one stamp file for the commands, one for the tests

.venv/bin/python:
	@if [ -z '$(PYTHON)' ] || ! '$(PYTHON)' -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'; then \
		echo 'mmtune needs Python 3.11 or newer with its venv module, and found none on the path.' >&2; \
		echo 'Name one with: make PYTHON=/path/to/python3.11 …   (on Debian and Ubuntu, venv is the package python3-venv)' >&2; \
		exit 1; fi
	'$(PYTHON)' -m venv .venv

# torch is installed first, so that the pin selects its build before another package requires torch. The build backend is installed
# with it, because pip's isolated builds ignore the constraints.
.venv/.installed: pyproject.toml constraints.txt | .venv/bin/python
	@echo 'setting up .venv, which takes some minutes, once'
	$(PIP_INSTALL) torch hatchling
	$(PIP_INSTALL) --no-build-isolation --editable '.[vision]'
	@touch $@

.venv/.installed-dev: .venv/.installed
	$(PIP_INSTALL) --no-build-isolation --editable '.[dev]'
	@touch $@
