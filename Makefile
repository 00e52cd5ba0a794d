# make quickstart   make the environment, install, run the main job on embedded data
# make test         make the environment, install, run the tests
# make test-long    what takes minutes: real sweeps, kills, benchmarks
# make test-zoo     every architecture of RobustBench's zoo with random weights (long)
# make check        format, lint, types and quick tests, before each commit
# make sweep-smoke  every sweep at its smallest, offline (minutes on two cores)
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: quickstart test test-long test-zoo check format sweep-smoke clean

quickstart: $(INSTALLED)
	$(BIN)/python train.py experiment=quickstart

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-long: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long -n 2 --dist loadfile

test-zoo: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m zoo tests/models

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -q -n 2 --dist loadfile

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

sweep-smoke: $(INSTALLED)
	$(BIN)/python -m sweeps.smoke

$(INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 to 3.13 is needed: make PYTHON=python3.12") if not (3, 10) <= sys.version_info[:2] <= (3, 13) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build ./*.egg-info
