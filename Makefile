# Everything here runs in an environment of its own, .venv, which the first target that needs it
# makes. It takes Python 3.10 or newer, make, a C++ compiler and a package index.
#
#   make demo                   train a small BlockDrop end to end and time it
#   make test                   the tests
#   make quick                  the quick ones, in three minutes
#   make test PYTHON=python3.12 TORCH=2.11.0    with another Python or torch (after make clean)

PYTHON ?= python3
# The torch version to install; empty: the one in constraints.txt.
TORCH ?=
PYTEST_FLAGS ?=
BENCH_FLAGS ?= --quick

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CONSTRAINTS := $(VENV)/constraints.txt
SANITIZED := build/sanitized
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g
SOURCES := $(shell find csrc -type f)
CXX_FILES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
ON_GPU = PYTHON=$(PYTHON) BLOCKDROP_GPU_SECONDS=$$((60 * $(MINUTES)))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test quick sanitize tsan fuzz faults kills load audit bench bench-guard lint types package format clean \
    check-aarch64 check-cuda-build gpu-extension gpu gpu-check gpu-bench gpu-decide

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1\t/' | expand -t 20

# Stamps make repeated calls quick. When a C++ source changes, pip builds again, but ninja
# compiles only what that change reaches.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(CONSTRAINTS): constraints.txt $(BIN)/python
	sed -E '$(if $(TORCH),s/^torch==.*/torch==$(TORCH)/)' $< > $@

$(VENV)/torch.stamp: $(CONSTRAINTS)
	$(PIP) install -q -c $< torch
	$(PIP) install -q -c $< setuptools wheel ninja pybind11
	touch $@

$(VENV)/package.stamp: $(VENV)/torch.stamp pyproject.toml setup.py $(SOURCES)
	$(PIP) install -q --no-build-isolation -c $(CONSTRAINTS) -e '.[train,test]'
	touch $@

install: $(VENV)/package.stamp ## make .venv and build the package into it

demo: install ## train a small BlockDrop on handwritten digits, show accuracy and latency
	$(BIN)/python -m train demo

# A process for each core, each with a file of tests at a time. One thread is as fast on such small
# networks, and does not wait for a core that others use.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

test: install ## run the tests
	$(PYTEST) $(PYTEST_FLAGS)

quick: install ## run the quick tests, two minutes
	$(PYTEST) -m "not slow and not gpu" $(PYTEST_FLAGS)

# The sanitizers' runtime has to be loaded before Python; libstdc++ with it, so that it finds the
# function that throws exceptions. Python itself leaks at exit.
sanitize: install ## run the C++ kernels' tests under AddressSanitizer and UBSan
	CFLAGS="$(SANITIZERS)" LDFLAGS="$(SANITIZERS)" BLOCKDROP_BUILD=cpu $(BIN)/python setup.py -q \
	    build --build-base build/sanitize --build-lib $(SANITIZED)
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	    ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(SANITIZED) \
	    $(BIN)/pytest tests/ops/test_plan.py tests/ops/test_walk.py tests/ops/test_walk_gates.py \
	    tests/ops/test_walk_imagenet.py tests/ops/test_library.py \
	    $(PYTEST_FLAGS)

check-aarch64: install ## compile the C++ kernels for aarch64, and run the walk's in an emulator
	$(BIN)/pytest tests/ops/test_aarch64_build.py $(PYTEST_FLAGS)

# Without torch, whose threads the sanitizer does not understand.
tsan: install ## run the CPU walk's queue, parts and gates under ThreadSanitizer, and plant races
	$(BIN)/pytest tests/ops/test_walk_queue.py $(PYTEST_FLAGS)

load: MINUTES ?= 20
load: install ## eight threads on one engine and on eight, tiny networks and real ones (MINUTES=20)
	$(BIN)/python -m tests.load --minutes $(MINUTES)

# Of all that is installed, without torch's +cpu; --strict: what the service does not know fails, too.
audit: install ## known vulnerabilities of what is installed; asks a service
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip --disable-pip-version-check install -q pip-audit
	$(PIP) freeze --exclude-editable | sed 's/+.*//' > build/audit/installed.txt
	build/audit/bin/pip-audit --strict --no-deps --disable-pip -r build/audit/installed.txt

fuzz: install ## 10,000 public calls with random arguments, against float64 (3 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --cases 10000

# One thread, in these, as a process that has others cannot be forked.
faults: install ## damage 300 files of each kind, and kill 300 saves (5 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults --cases 300
	OMP_NUM_THREADS=1 BLOCKDROP_KILLS=300 $(BIN)/python -m pytest tests/test_faults.py -k kill_while_saving

kills: install ## kill every stage of the trainer ten times: the same bits in the end (25 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.kills --kills 10

bench: install ## run the quick benchmarks (BENCH_FLAGS= for all)
	$(BIN)/python -m pytest benchmarks $(BENCH_FLAGS) $(PYTEST_FLAGS)

bench-guard: install ## before a release: have the headline figures fallen? (2 minutes, quiet machine)
	$(BIN)/python -m benchmarks.guard

lint: types ## check style, format and types
	$(BIN)/ruff check -q .
	$(BIN)/ruff format -q --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

# Of what a user sees: the package's inside follows torch's own types only so far.
types: install ## type-check programs that use the package
	$(BIN)/mypy --strict --follow-imports=silent tests/typing/public.py

package: install ## build the sdist, and the wheel from it
	$(BIN)/python -m build --no-isolation

format: install ## put all sources into format
	$(BIN)/ruff check -q --fix .
	$(BIN)/ruff format -q .
	$(BIN)/clang-format -i $(CXX_FILES)

check-cuda-build: ## build and test the CUDA wheel, no GPU needed (10 minutes, downloads 5 GB)
	PYTHON=$(PYTHON) .ci/check-cuda-build

gpu-extension: ## build the CUDA extension for a machine with a GPU, no GPU needed (as above)
	PYTHON=$(PYTHON) .ci/check-cuda-build build

gpu: MINUTES ?= 24
gpu: ## on a machine with a GPU, no network needed: the three that follow (MINUTES=24)
	$(ON_GPU) .ci/gpu

gpu-check gpu-bench gpu-decide: MINUTES ?= 8
gpu-check: ## build with the torch installed there, GPU tests, sanitizer (MINUTES=8; again: goes on)
	$(ON_GPU) .ci/gpu-check

gpu-bench: ## the GPU's figures, and which targets they meet (MINUTES=8; again: goes on)
	$(ON_GPU) .ci/gpu-bench

gpu-decide: ## tune, calibrate: what `auto` goes by there from then on (MINUTES=8; again: goes on)
	$(ON_GPU) .ci/gpu-bench decide

clean: ## remove the environment and what was built
	rm -rf $(VENV) build dist *.egg-info blockdrop_fast/_C.*.so blockdrop_fast/_build_record.json
	rm -rf .pytest_cache .ruff_cache .hypothesis .benchmarks
