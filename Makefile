# With Python 3.11 or later:
#   make demo    set up an environment, train on built-in images, evaluate and draw
#   make test    lint, type checks and tests
# PYTHON=... sets the interpreter, THREADS=... the number of threads of the tests.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The models of the tests are too small for two threads, which only wait for each other.
THREADS ?= 1

.PHONY: demo test lint types test-slow readme clean

demo: $(VENV)/installed
	$(BIN)/hpm demo

test test-slow: export OMP_NUM_THREADS ?= $(THREADS)

test: lint types
	$(BIN)/python -m pytest

# Some tests take minutes, and more on a busy machine.
test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -m slow --timeout 1800

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check hpm tests benchmarks docs
	$(BIN)/lint-imports

types: $(VENV)/installed
	$(BIN)/mypy

# The versions that were tested, torch's CPU build among them; see the README for a GPU.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt torch --editable '.[dev]'
	touch $@

# The demo's numbers and figure, as the README shows them.
readme: $(VENV)/installed
	$(BIN)/python docs/readme.py

clean:
	rm -rf $(VENV) build *.egg-info
