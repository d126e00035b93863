# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
# A plain `torch` takes the CUDA build on Linux; any build of 2.11 or later will do.
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin

.PHONY: install demo test lint types check bench clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[cpu,train,video,dev]"
	touch $@

demo: install
	$(BIN)/hflow-rt demo

test: install
	$(BIN)/pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy does not see through the mapped folders of an editable install, so it reads an ordinary one
types: install
	rm -rf build
	$(BIN)/pip install --quiet --no-deps --target build/types .
	cd build/types && MYPYPATH=. $(abspath $(BIN))/mypy --config-file $(abspath pyproject.toml) --python-executable $(abspath $(BIN))/python

check: lint types test

bench: install
	$(BIN)/pytest benchmarks --report cpu

clean:
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache
