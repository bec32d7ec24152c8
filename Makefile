# make demo    install into .venv and run the whole job on generated data
# make test    every test but those that break clusters; skipped ones are listed
# make chaos   those: workers, nodes, drivers, disks and memory are lost on purpose
# make check   lint, types, import contracts, unit tests
# make install only the environment
#
# PYTHON picks the interpreter of a new .venv (3.11 or later). PIP_FLAGS reaches every pip call, for example
# PIP_FLAGS='--extra-index-url https://download.pytorch.org/whl/cpu' for the CPU build of torch.

PYTHON ?= python3
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q $(PIP_FLAGS) -c constraints.txt
STAMP := $(VENV)/.installed

.PHONY: demo test chaos check install clean
.DELETE_ON_ERROR:

demo: $(STAMP)
	$(BIN)/rose-ray demo

# Two processes: all that need Ray one after another, and beside them the rest.
test: $(STAMP)
	$(BIN)/python -m pytest -rs -n 2 --dist loadscope --no-loadscope-reorder

chaos: $(STAMP)
	$(BIN)/python -m pytest -rs -m chaos

check: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -rs tests/unit

install: $(STAMP)

# deepspeed comes as source and asks torch for its version while it is built, so torch goes first and the
# builds run in this environment. DS_BUILD_OPS=0: none of its compiled operators is needed.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is $$($(PYTHON) -V 2>&1), but Python 3.11 or later is needed: make PYTHON=python3.11 ..."; exit 1; }
	@echo "Installing into $(VENV) (some minutes, about 3 GB)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools wheel hatchling editables
	DS_BUILD_OPS=0 $(PIP) --no-build-isolation deepspeed
	$(PIP) --no-build-isolation -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
