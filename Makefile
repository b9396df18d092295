# `make demo`, `make test` and `make test-trt` do all the set-up of a fresh machine: a virtual environment in .venv with the pinned set.
# Options: PYTHON=python3.12 (which interpreter), DEMO="--fast" (options of the demo), PYTEST="-k cli" (of the tests).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO ?=
PYTEST ?= -n 2 --dist loadfile

# What `make test-trt` needs besides: NVIDIA's wheels, which are proprietary and large (350 MB without Triton), so that no other
# target installs them. TensorRT-RTX is whole; of TensorRT these are the Python bindings and the lean runtime, for its plugin
# registry, without the library that builds. Triton compiles the plugins' kernels.
RTX := tensorrt_rtx==1.7.1.116 polygraphy==0.53.6 'cuda-python>=13'
TRT_VERSION ?= 11.4.0.106
TRITON := triton==3.9.0

.PHONY: demo test test-trt lint clean
.DEFAULT_GOAL := test

demo: $(READY)
	$(BIN)/compexport demo $(DEMO)

test: lint
	$(BIN)/python -m pytest $(PYTEST)

test-trt: $(VENV)/.ready-trt
	$(BIN)/python -m pytest -m trt $(PYTEST)

$(VENV)/.ready-trt: $(READY) Makefile
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(RTX)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  tensorrt_cu13_bindings==$(TRT_VERSION) tensorrt_cu13==$(TRT_VERSION) tensorrt_lean_cu13_libs==$(TRT_VERSION) $(TRITON)
	@touch $@

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

# The stamp is newer than what it was made from, so a second call does nothing.
$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null 2>&1 || \
	  { echo "make: no $(PYTHON) on PATH; install Python 3.11 or newer, or set PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: $(PYTHON) is $$($(PYTHON) -V 2>&1), expected 3.11 or newer; set PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "make: $(PYTHON) has no venv module; install it (on Debian and Ubuntu: the package python3-venv)" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu,export,demo,dev]'
	@touch $(READY)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
