# Two commands matter: `make demo` and `make test`. Both work on a fresh clone with Python 3.11 or later and a C++ compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CSRC := $(wildcard src/moebius/native/csrc/*)
CMAKE := PATH="$(abspath $(BIN)):$$PATH" cmake
CONFIGURE := $(CMAKE) -S . -DSKBUILD_PROJECT_NAME=moebius -DPython_EXECUTABLE=$(abspath $(BIN)/python) -DCMAKE_BUILD_TYPE=Release
# Tests of the compiled kernels and of what runs through them. Leaks are the interpreter's, and are not looked for.
SANITIZED := $(addprefix tests/kernels/test_,agreement.py borders.py empty.py packed_linear.py random_calls.py) \
	tests/runtime/test_direct.py tests/runtime/test_writes.py

WATCHED = ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so.6)" \
	$(BIN)/python -m tests.sanitized build/sanitize

LOWEST := $(shell sed -n 's/.*"transformers>=\([0-9.]*\),.*/\1/p' pyproject.toml)

.PHONY: demo test lowest kills fuzz sanitize warnings check style bench clean

demo: $(READY)  ## the reference model from 16 bit to one, with a table, a figure and what each model writes
	rm -rf demo
	$(BIN)/moebius compare --preset demo --samples 3 --out demo

test: $(READY)  ## every test, in parallel
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations 10

lowest: $(READY)  ## loading and quantizing with the lowest transformers that pyproject.toml allows
	rm -rf build/lowest
	$(BIN)/python -m pip install -q --no-deps --target build/lowest 'transformers==$(LOWEST)'
	PYTHONPATH=build/lowest $(BIN)/python -m pytest -n 2 --dist loadfile tests/hf tests/pipeline/test_run.py tests/test_private_transformers.py

kills: $(READY)  ## 210 runs that are killed at file-system operations and finished: the bytes of a run that was not stopped
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.kills --count 70

fuzz: $(READY) $(if $(SANITIZE),build/sanitize)  ## 10,000 packed checkpoints with something changed: each is refused in words or runs
	OMP_NUM_THREADS=1 $(if $(SANITIZE),$(WATCHED),$(BIN)/python) -m tests.fuzz.run --count 10000

build/sanitize: $(READY) $(CSRC)
	$(CONFIGURE) -B build/sanitize -DMOEBIUS_SANITIZE=ON -DMOEBIUS_WARNINGS=ON
	$(CMAKE) --build build/sanitize --parallel 2
	@touch $@

sanitize: build/sanitize  ## the kernel tests with C++ under the address and the undefined-behavior sanitizer (g++ or clang++)
	OMP_NUM_THREADS=1 $(WATCHED) -q -p no:xdist --capture=sys $(SANITIZED)

warnings: $(READY)  ## C++ with warnings as errors, apart from the build in use
	$(CONFIGURE) -B build/warnings -DMOEBIUS_WARNINGS=ON
	$(CMAKE) --build build/warnings --parallel 2

check: $(READY) warnings  ## linter, formatter and types, of Python and of C++
	$(BIN)/clang-format --dry-run --Werror $(CSRC)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(READY)  ## what `check` would complain about, mended where a tool can
	$(BIN)/clang-format -i $(CSRC)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)  ## seconds and peak memory of calibration and of every method, and milliseconds per token of the experts
	$(BIN)/python benchmarks/quantize.py
	$(BIN)/python benchmarks/kernel.py

clean:
	rm -rf $(VENV) build demo

# torch first and by its pin: pip then takes the build at hand instead of resolving a newer one for another package.
$(READY): pyproject.toml constraints.txt CMakeLists.txt $(CSRC)
	@echo "setting up $(VENV) (once, a minute or two)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@
