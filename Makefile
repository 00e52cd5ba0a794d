# make quickstart   make the environment, install, run the main job on embedded data
# make check        format, lint, import contract and types
# make test         make the environment, install, run the tests
# make test-cpu     the tests whose results depend on kernels, once more as an older CPU would run them
# make test-long    the rest: whole runs, several processes, real sweeps, kills, benchmarks (long)
# make test-lowest  the tests with the lowest versions that pyproject.toml names, in .venv-lowest
# make test-zoo     every architecture of RobustBench's zoo with random weights (long)
# make docs         the site of the documentation, into site/; a broken link is an error
# make coverage     the tests with a report of the lines that none of them runs
# make sweep-smoke  every sweep at its smallest, offline (minutes on two cores)
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: quickstart check format test test-cpu test-long test-lowest test-zoo sweep-smoke docs coverage clean

quickstart: $(INSTALLED)
	$(BIN)/python train.py experiment=quickstart

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: $(INSTALLED)
	$(PYTEST) -q -n 2 --dist loadfile

# AVX2 where the CPU has AVX-512, else PyTorch's kernels for any CPU
CPU ?= $(shell grep -qs avx512f /proc/cpuinfo && echo avx2 || echo default)
test-cpu: $(INSTALLED)
	ATEN_CPU_CAPABILITY=$(CPU) $(if $(filter avx2,$(CPU)),ONEDNN_MAX_CPU_ISA=AVX2) $(PYTEST) -q -n 2 --dist loadfile \
	  tests/attacks tests/evaluation tests/sensitivity tests/models/test_speed.py \
	  tests/distributed/test_evaluation.py tests/test_objectives.py tests/test_losses.py tests/test_gradients.py tests/test_threat.py

test-long: $(INSTALLED)
	$(PYTEST) -m long -n 2 --dist loadfile

test-lowest:
	uv venv --python 3.10 .venv-lowest
	uv pip install --quiet --python .venv-lowest --resolution lowest-direct --editable ".[dev]"
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -q -n 2 --dist loadfile

test-zoo: $(INSTALLED)
	$(PYTEST) -m zoo tests/models

sweep-smoke: $(INSTALLED)
	$(BIN)/python -m sweeps.smoke

coverage: $(INSTALLED)
	$(PYTEST) -q -n 2 --dist loadfile --cov=wdat --cov-report=term-missing:skip-covered

docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	PYTHONPATH=. $(BIN)/mkdocs build --strict --quiet

$(INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 to 3.13 is needed: make PYTHON=python3.12") if not (3, 10) <= sys.version_info[:2] <= (3, 13) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build site ./*.egg-info
