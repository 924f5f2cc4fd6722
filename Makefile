# make demo   sets up, trains plain and recycling agents on drifting tasks, prints a table and draws the curves
# make test   sets up, checks style and types, runs the tests
# make slow   the tests that take minutes

PYTHON ?= python3
# Another torch: make demo TORCH="torch==2.13.0 --index-url ..." (the pinned version is a CPU or CUDA build,
# whichever your pip finds).
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test slow clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import sys; sys.exit('Python 3.11 or newer is needed: make PYTHON=python3.11' if sys.version_info < (3, 11) else 0)"
	$(BIN)/python -m pip install --quiet $(TORCH)
	grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/python -m agents.demo

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2

slow: setup
	$(BIN)/python -m pytest -m slow

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
