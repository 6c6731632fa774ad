# Two commands do all the set-up: `make demo` runs the main job, `make test` passes the tests.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin
# Over what torch-tensorrt-rtx pins: the first TensorRT-RTX that can run engines of several devices.
TENSORRT_RTX := 'tensorrt_rtx>=1.7.1.116,<1.8'

.PHONY: demo test lint check check-all bench clean

$(STAMP): pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[rtx,models,dev]'
	$(BIN)/pip install --quiet --no-warn-conflicts $(TENSORRT_RTX)
	touch $@

demo: $(STAMP)
	$(BIN)/cp-convert examples/flux.py --strategy ulysses --world 8 --force
	$(BIN)/cp-convert inspect flux-ulysses-w8
	$(BIN)/cp-convert run flux-ulysses-w8 --executor torch --devices cpu

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations 10 -m "not slow"

check-all: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations 10

test: lint check

bench: $(STAMP)
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.stages

clean:
	rm -rf $(VENV) build dist *.egg-info
