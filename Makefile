# Every command makes its own environment in .venv when that is missing or older than the requirements.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
PACKAGES := ifdefense attacks classifiers benchmarks

.PHONY: demo test lint docs weights clean

demo: $(READY)
	$(BIN)/ifdefense-bench demo --output demo --force

test: $(READY)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(READY)
	$(BIN)/ruff check $(PACKAGES) tests
	$(BIN)/ruff format --check $(PACKAGES) tests
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py

# The site, in site/; fails on a dead link and on a public name without documentation.
docs: $(READY)
	$(BIN)/python docs/build_site.py

# Trains every shipped network again, in hours: see weights.mk.
weights: $(READY)
	$(MAKE) --file weights.mk

$(READY): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,dev,train,docs]'
	touch $(READY)

clean:
	rm -rf build dist demo site .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
