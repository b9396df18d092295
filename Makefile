# `make demo`, `make test` and `make test-trt` do all the set-up of a fresh machine: a virtual environment in .venv with the pinned set.
# `make test-gpu` makes another one in .venv-gpu.
# Options: PYTHON=python3.12 (which interpreter), DEMO="--fast" (options of the demo), PYTEST="-k cli" (of the tests).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO ?=
PYTEST ?= -n 2 --dist loadfile

# What `make test-trt` needs besides: NVIDIA's wheels, which are proprietary and large (350 MB without Triton), so that no other
# target installs them. TensorRT-RTX is whole; of TensorRT these are the Python bindings and the lean runtime, for its plugin
# registry, without the library that builds. Triton compiles the plugins' kernels. ONNX Runtime for GPUs (250 MB) is not NVIDIA's.
# Where some cannot be installed (no network, no wheel for this machine or Python), one line says so, and the tests that need them
# skip; the next call tries again.
RTX := tensorrt_rtx==1.7.1.116 polygraphy==0.53.6 'cuda-python>=13'
TRT_VERSION ?= 11.4.0.106
TRT := --no-deps tensorrt_cu13_bindings==$(TRT_VERSION) tensorrt_cu13==$(TRT_VERSION) tensorrt_lean_cu13_libs==$(TRT_VERSION)
TRITON := --no-deps triton==3.9.0

# `make test-gpu` needs an NVIDIA card with its driver, and an environment of its own: onnxruntime and onnxruntime-gpu overwrite
# each other. TORCH="torch==2.14.1" takes another build of PyTorch; GPU_PYTHON=/path/to/python takes an environment that is there
# already, as it is. TensorRT's library comes from NVIDIA's own index, to which its package on PyPI leads.
GPU_VENV := .venv-gpu
GPU_PYTHON ?= $(GPU_VENV)/bin/python
TORCH ?= torch==2.13.0
ORT_GPU := onnxruntime-gpu==1.31.1

.PHONY: demo test test-trt test-gpu lint clean
.DEFAULT_GOAL := test

demo: $(READY)
	$(BIN)/compexport demo $(DEMO)

test: lint
	$(BIN)/python -m pytest -m "not trt" $(PYTEST)

test-trt: $(VENV)/.ready-rtx $(VENV)/.ready-trt $(VENV)/.ready-triton $(VENV)/.ready-ort-gpu
	$(BIN)/python -m pytest -m trt $(PYTEST)

$(VENV)/.ready-rtx: $(READY) Makefile
	@$(call wheels,TensorRT-RTX,-c constraints.txt $(RTX))
$(VENV)/.ready-trt: $(READY) Makefile
	@$(call wheels,TensorRT $(TRT_VERSION),$(TRT))
$(VENV)/.ready-triton: $(READY) Makefile
	@$(call wheels,Triton,$(TRITON))
# Beside the environment, not in it, where it would overwrite the package for the processor.
$(VENV)/.ready-ort-gpu: $(READY) Makefile
	@$(call wheels,$(ORT_GPU),--no-deps --upgrade --target $(VENV)/onnxruntime-gpu $(ORT_GPU))

# Install, or say in one line, with the last thing that pip said, that it is not possible.
define wheels
said=$$($(BIN)/python -m pip install --quiet --disable-pip-version-check $(2) 2>&1) && touch $@ || \
  echo "make: $(1) cannot be installed, tests that need it skip: $$(echo "$$said" | grep ERROR: | tail -1)" >&2
endef

# On a card with a version of its own of some library, a warning that nobody has seen yet is no failure.
test-gpu: $(filter $(GPU_VENV)/.ready,$(GPU_PYTHON:$(GPU_VENV)/bin/python=$(GPU_VENV)/.ready))
	$(GPU_PYTHON) -m pytest -m gpu -W default $(PYTEST_GPU)

$(GPU_VENV)/.ready: pyproject.toml constraints.txt Makefile
	$(require_python)
	@$(PYTHON) -c 'import ctypes; ctypes.CDLL("libcuda.so.1")' 2>/dev/null || \
	  { echo "make: no driver of NVIDIA's here (libcuda.so.1); test-gpu needs a machine with an NVIDIA card" >&2; exit 1; }
	@test -x $(GPU_VENV)/bin/python || $(PYTHON) -m venv $(GPU_VENV)
	@grep -v -e '^torch==' -e '^onnxruntime==' constraints.txt >$(GPU_VENV)/constraints.txt
	$(GPU_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c $(GPU_VENV)/constraints.txt \
	  -e '.[gpu,export,demo,dev]' '$(TORCH)' $(ORT_GPU) triton 'cuda-python>=13' polygraphy==0.53.6
	@$(GPU_VENV)/bin/python -m pip install --quiet --disable-pip-version-check tensorrt==$(TRT_VERSION) || \
	  echo "make: tensorrt $(TRT_VERSION) could not be installed; tests that need it will skip" >&2
	@touch $@

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

define require_python
@command -v $(PYTHON) >/dev/null 2>&1 || \
  { echo "make: no $(PYTHON) on PATH; install Python 3.11 or newer, or set PYTHON=/path/to/python" >&2; exit 1; }
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
  { echo "make: $(PYTHON) is $$($(PYTHON) -V 2>&1), expected 3.11 or newer; set PYTHON=/path/to/python" >&2; exit 1; }
@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
  { echo "make: $(PYTHON) has no venv module; install it (on Debian and Ubuntu: the package python3-venv)" >&2; exit 1; }
endef

# The stamp is newer than what it was made from, so a second call does nothing.
$(READY): pyproject.toml constraints.txt
	$(require_python)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu,export,demo,dev]'
	@touch $(READY)

clean:
	rm -rf $(VENV) $(GPU_VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
