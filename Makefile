# Everything runs in .venv, which is made with python3, venv and pip alone.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install test docs clean

install: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev,docs]'
	touch $@

# Lint, types, docs, then the tests: the last line is pytest's. One thread per process: on two cores, the
# threads of several processes would wait for each other.
test: export OMP_NUM_THREADS ?= 1
test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	$(BIN)/pytest

# The documentation on http://127.0.0.1:8000, built anew whenever a page changes.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

clean:
	rm -rf .venv site build
