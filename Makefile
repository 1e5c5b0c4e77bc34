# make demo            runs the main job end to end on a small built-in model
# make test            runs the tests
# make test-clients    runs the tests that talk to the library through other programs: SDKs, notebooks, a browser
# make docs            builds the documentation site into site/
# Each makes their own virtual environment; nothing but Python (3.10 or newer) and make is needed.

PYTHON ?= python3
VENV ?= .venv
# On macOS MLX brings its Metal back end; on Linux one has to be chosen: cpu or cuda13.
MLX ?= $(if $(filter Darwin,$(shell uname -s)),,cpu)
JOBS ?= 2

comma := ,
BIN := $(VENV)/bin
# NumPy's threads and the test processes would fight for the cores.
export OPENBLAS_NUM_THREADS ?= 1

.PHONY: demo test test-full test-clients docs docs-serve bench lint types packages lowest clean prepared clang chromium

demo: $(VENV)/.installed
	@OPENBLAS_NUM_THREADS= $(BIN)/python tools/demo.py

test: prepared
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow and not clients"

test-full: prepared
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not clients"

test-clients: $(VENV)/.installed-clients chromium
	$(BIN)/python -m pytest -m clients tests/clients

# Every warning is an error: a link or an anchor that leads nowhere, a page that is in no menu, a name that is not there.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

docs-serve: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve

bench: $(VENV)/.installed-dev
	@OPENBLAS_NUM_THREADS= $(BIN)/python benchmarks/small_model.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What a user's type checker says of the public API.
types: $(VENV)/.installed-ci
	$(BIN)/mypy --strict --config-file= tests/typing/user_program.py
	$(BIN)/pyright --pythonpath $(BIN)/python tests/typing/user_program.py

# Wheel and sdist, used from outside the clone.
packages: $(VENV)/.installed-ci
	$(BIN)/python tools/check_packages.py

# The lowest versions of all dependencies that pyproject.toml allows.
lowest: $(VENV)/.installed-dev
	$(BIN)/python tools/lowest_versions.py

# Python's packages and clang are installed side by side.
prepared:
	@$(MAKE) --no-print-directory -j2 $(VENV)/.installed-dev clang

# $(call apt,PROGRAM,PACKAGE) installs a package of Debian where root can. Where it cannot be had, tests that need it are
# skipped, unless FLASH_MOE_REQUIRE names it (tests/required_tools.py).
apt = if [ -z "$$(command -v $(1))" ] && [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
	  { apt-get update -qq && apt-get install -qq -y --no-install-recommends $(2); } > /dev/null || true; fi

# The kernels' emulator needs clang 19 or newer.
clang:
	@$(call apt,clang++-19,clang-19)

chromium:
	@$(call apt,chromium,chromium)

clean:
	rm -rf $(VENV) build dist site .pytest_cache .hypothesis .mypy_cache .ruff_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) is older than 3.10; name another with 'make PYTHON=python3.12'"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# $(call install,EXTRAS) installs the library from this folder with extras, and with a back end of MLX.
extras = $(subst $() ,$(comma),$(strip $(1) $(MLX)))
install = $(BIN)/python -m pip install -q --disable-pip-version-check -e ".$(if $(extras),[$(extras)])"

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(call install,)
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(call install,dev)
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-clients $(VENV)/.installed-ci $(VENV)/.installed-docs: $(VENV)/.installed-%: $(VENV)/.installed-dev
	$(call install,dev $*)
	@touch $@
