# Two commands matter: `make demo` and `make test`. Both work on a fresh clone with Python 3.11 or later and a C++ compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

LOWEST := $(shell sed -n 's/.*"transformers>=\([0-9.]*\),.*/\1/p' pyproject.toml)

.PHONY: demo test lowest kills fuzz check style bench clean

demo: $(READY)  ## the reference model from 16 bit to one, with a table, a figure and what each model writes
	rm -rf demo
	$(BIN)/moebius compare --preset demo --samples 3 --out demo

test: $(READY)  ## every test, in parallel
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations 10

lowest: $(READY)  ## loading and quantizing with the lowest transformers that pyproject.toml allows
	rm -rf build/lowest
	$(BIN)/python -m pip install -q --no-deps --target build/lowest 'transformers==$(LOWEST)'
	PYTHONPATH=build/lowest $(BIN)/python -m pytest -n 2 --dist loadfile tests/hf tests/pipeline/test_run.py

kills: $(READY)  ## 210 runs that are killed at file-system operations and finished: the bytes of a run that was not stopped
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.kills --count 70

fuzz: $(READY)  ## 10,000 packed checkpoints with something changed: each is refused in words or runs
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.mutate --count 10000

check: $(READY)  ## linter, formatter and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(READY)  ## what `check` would complain about, mended where a tool can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)  ## seconds and peak memory of calibration and of every method, and milliseconds per token of the experts
	$(BIN)/python benchmarks/quantize.py
	$(BIN)/python benchmarks/kernel.py

clean:
	rm -rf $(VENV) build demo

# torch first and by its pin: pip then takes the build at hand instead of resolving a newer one for another package.
$(READY): pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/moebius/kernels/*/csrc/*)
	@echo "setting up $(VENV) (once, a minute or two)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@
