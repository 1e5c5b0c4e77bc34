# make demo    runs the main job end to end on a small built-in model
# make test    runs the tests
# Both make their own virtual environment; nothing but Python (3.10 or newer) and make is needed.

PYTHON ?= python3
VENV ?= .venv
# On macOS MLX brings its Metal back end; on Linux one has to be chosen: cpu or cuda13.
MLX ?= $(if $(filter Darwin,$(shell uname -s)),,cpu)
JOBS ?= 2

comma := ,
BIN := $(VENV)/bin
# NumPy's threads and the test processes would fight for the cores.
export OPENBLAS_NUM_THREADS ?= 1

.PHONY: demo test test-full bench lint clean prepared clang

demo: $(VENV)/.installed
	@OPENBLAS_NUM_THREADS= $(BIN)/python tools/demo.py

test: prepared
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow"

test-full: prepared
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

bench: $(VENV)/.installed-dev
	@OPENBLAS_NUM_THREADS= $(BIN)/python benchmarks/small_model.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Python's packages and clang are installed side by side.
prepared:
	@$(MAKE) --no-print-directory -j2 $(VENV)/.installed-dev clang

# The kernels' emulator needs clang 19 or newer; where it cannot be installed its tests are skipped.
clang:
	@if [ -z "$$(command -v clang++-19)" ] && [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
	  { apt-get update -qq && apt-get install -qq -y --no-install-recommends clang-19; } > /dev/null || true; fi

clean:
	rm -rf $(VENV) build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) is older than 3.10; name another with 'make PYTHON=python3.12'"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".$(if $(MLX),[$(MLX)])"
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[dev$(if $(MLX),$(comma)$(MLX))]"
	@touch $@ $(VENV)/.installed
