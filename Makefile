# The whole set-up: `make demo` and `make test` do it by themselves on a machine with Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CORES := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)

.PHONY: setup demo test lint interop bench clean

setup: $(READY)

# PyTorch comes first and pinned: any later package that asks for torch is then content with it.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "omnifp4 needs Python 3.11 or later")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH_OPTIONS) "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev --editable .
	touch $@

demo: setup
	$(BIN)/omnifp4 demo

test: setup
	$(BIN)/python -m pytest -n $(CORES) --dist loadgroup

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The peers' own libraries as judges, each in an environment of its own under .venv-interop.
interop: setup
	PYTHON=$(PYTHON) interop/run.sh

bench: setup
	$(BIN)/python benchmarks/formats_encode.py
	$(BIN)/python benchmarks/quantize_layer.py

clean:
	rm -rf $(VENV) .venv-interop build dist *.egg-info
