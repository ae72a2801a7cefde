# make demo     install, then the main job: train Single, Looped and SHIFT, write runs/demo/report.html
# make test     install, then the tests
# make fuzz     install, then thousands of random blocks against plain PyTorch
# make check    install, then lint, types and tests
# make matrix   the tests on other versions of Python and torch
# make lint     install, then formatter and linter
# make types    install, then types
# make sanitize the CPU kernels' tests over a build that stops at what is undefined
# make bench    install, then our kernels beside PyTorch's on this machine
# make install  only .venv, with what the demo needs
# make clean    remove .venv and all that was built

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install -q -c $(VENV)/constraints.txt
# The package is built against the torch that is in .venv, so its build must see it.
HERE   := --no-build-isolation -e

.PHONY: install demo test fuzz lint types check bench sanitize matrix clean
install: $(VENV)/train.stamp

demo: install
	$(BIN)/shift-compare --preset demo --out runs/demo

# One process a core, each with one thread. A process that is done takes tests over from the others.
test: $(VENV)/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

# 5,000 random blocks, called in every way, against float64: some minutes; other ones each time.
fuzz: $(VENV)/dev.stamp
	SHIFT_FUZZ=5000 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/kernels/test_fuzz.py tests/kernels/test_cuda_registers.py -n auto --maxprocesses 8

lint: $(VENV)/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/dev.stamp
	$(BIN)/mypy

check: lint types test

bench: install
	$(BIN)/shift-bench --quick

# The CPU kernels' tests over a build that stops at any access out of bounds or undefined behaviour.
sanitize: $(VENV)/dev.stamp
	CXX="$${CXX:-g++}" $(BIN)/python tests/sanitize.py

# The tests that need neither Triton nor CUDA on every Python and torch that can be installed here.
matrix:
	$(PYTHON) tests/matrix.py

clean:
	rm -rf $(VENV) $(VENV)-matrix build *.egg-info

# A machine with a GPU keeps the torch it has; any other gets the tested version, as a CPU build where
# pip can see one (where it can't, add a source of CPU wheels to pip's own configuration).
$(VENV)/constraints.txt: constraints.txt
	@if [ -e /dev/nvidiactl ] && $(PYTHON) -c 'import torch' 2>/dev/null; then \
	    $(PYTHON) -m venv --system-site-packages $(VENV); \
	else \
	    torch=$$(grep '^torch==' constraints.txt); \
	    $(PYTHON) -m venv $(VENV) && echo "installing $$torch" && \
	    { { [ ! -e /dev/nvidiactl ] && $(BIN)/python -m pip install -q "$$torch+cpu" 2>/dev/null; } \
	      || $(BIN)/python -m pip install -q "$$torch"; }; \
	fi
	@$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $@.new
	@grep -v '^torch==' constraints.txt >> $@.new
	@mv $@.new $@

$(VENV)/train.stamp: $(VENV)/constraints.txt pyproject.toml setup.py build_native.py \
    $(wildcard csrc/* csrc/*/* csrc/*/*/*)
	$(PIP) "setuptools>=77" "pybind11>=2.13" ninja
	$(PIP) $(HERE) ".[train,plots]"
	@touch $@

# The tests also hold the CUDA kernels to the chip's limits, so here they are compiled without a GPU, too.
$(VENV)/dev.stamp: $(VENV)/train.stamp
	CUDA_ARCHS="$${CUDA_ARCHS-default}" $(PIP) $(HERE) ".[dev]"
	@touch $@
