# On an empty clone each target first installs what it needs into .venv; later calls start at once.
#   make demo    teach the embedded diffusion model a new concept; writes demo/
#   make test    the unit tests, a few minutes on two cores
#   make check   format, lint, types, and the slow tests (packaging, browser, long trainings)
#   make docs    rewrite the tables in docs/ that are made from the code
#   make ui      the studio over the runs of this folder, on the loopback interface

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
# Two test processes with one thread each: threads that fight for a core are many times slower than one.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest

.PHONY: demo test check docs ui setup browser clean

demo: setup
	$(BIN)/graft demo --out demo

test: setup
	$(PYTEST) -q -n 2 -m "not slow and not alone"

check: setup browser
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) -q -n 2 -m slow
	$(PYTEST) -q -m alone

docs: setup
	$(BIN)/python docs/tables.py

ui: setup
	$(BIN)/graft ui

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed. Name one: make PYTHON=/path/to/python3.12" >&2; exit 2; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV) || { \
		test "$$(id -u)" = 0 && command -v apt-get >/dev/null \
		&& apt-get update -qq && apt-get install -y -qq python3-venv && $(PYTHON) -m venv --clear $(VENV); } \
		|| { echo "Python's venv module is missing. On Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
	@echo "Installing into $(VENV): about 5 GB with the ordinary build of torch on Linux, some minutes."
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[dev]"
	@touch $@

browser:
	@command -v chromium >/dev/null || { \
		test "$$(id -u)" = 0 && command -v apt-get >/dev/null \
		&& apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; } \
		|| { echo "The browser tests need chromium on the PATH." >&2; exit 2; }

clean:
	rm -rf demo build dist .pytest_cache .ruff_cache .mypy_cache
