# make demo       co-learning on real images, five participants, through `flwr run`
# make demo-fast  the same demo in one process, without `flwr run` and Ray: ten seconds
# make test       lint, types and all tests, in one process more than there are processors
# make test-fast  the tests for daily work, without those that take seconds or more
# make docs       the pages of docs/ as a site that needs no network: site/index.html
# make versions   the plugin's tests against the oldest and the newest flwr
# make mutants    60 random changes of the core, and those that no test notices: ten minutes
# All set up .venv by themselves; PYTHON=python3.12 chooses another interpreter.

PYTHON ?= python3
# Deployments mostly wait, so that one process more than processors keeps those busy.
WORKERS ?= $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1)
# Compiled modules are kept, which hundreds of processes of deployments import.
PYTEST = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 TF_NUM_INTRAOP_THREADS=1 \
	.venv/bin/python -m pytest \
	--numprocesses $(WORKERS) --maxprocesses 8 --dist loadscope --no-loadscope-reorder
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo demo-fast test test-fast lint docs versions mutants clean

demo: .venv/demo.stamp
	.venv/bin/python -m simulations.demo

demo-fast: .venv/demo.stamp
	.venv/bin/python -m simulations.demo --in-process

test: lint
	$(PYTEST)

# A process a processor, since none of these waits.
test-fast: .venv/dev.stamp
	$(PYTEST) --numprocesses logical -m "not slow"

lint: .venv/dev.stamp
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

docs: .venv/docs.stamp
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet
	@echo "The site is in site/index.html"

versions: .venv/dev.stamp
	.venv/bin/nox

mutants: .venv/dev.stamp
	.venv/bin/python -m tests.mutants

clean:
	rm -rf .venv outputs site

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo.stamp: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) -e ".[simulation,torch,report]"
	touch $@

.venv/docs.stamp: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) -e ".[docs]"
	touch $@

.venv/dev.stamp: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) -e ".[dev]"
	touch $@
