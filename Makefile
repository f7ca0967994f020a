# Everything a person repeats. `make demo` and `make test` do all their own set-up.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup build demo test sanitize lint bench clean
setup: $(READY)

$(READY): pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.cu csrc/*/*.h csrc/*/*/*.h)
	test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel ninja
	$(RUN)/python -m pip install --quiet "torch>=2.11"
	# Built against the torch that was just installed, not against one that pip would fetch for the build alone.
	$(RUN)/python -m pip install --quiet --no-build-isolation --editable ".[test,bench,video,dev]"
	touch $@

# The compiled extension anew, for instance after another torch was installed.
build:
	$(RUN)/python setup.py --quiet build_ext --inplace --force

demo: $(READY)
	$(RUN)/pcmecl-fast demo

test: $(READY)
	$(RUN)/python -m pytest

# The C++ kernels alone, every instruction set that this machine has, under the address and undefined-behaviour sanitizers.
sanitize:
	mkdir -p build
	$(CXX) -std=c++17 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -Wno-psabi \
		csrc/tests/kernels_test.cpp csrc/cpu/kernels.cpp csrc/cpu/portable.cpp csrc/cpu/avx2.cpp csrc/cpu/avx512.cpp \
		-o build/kernels_test
	build/kernels_test

lint: $(READY)
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .
	$(RUN)/mypy

bench: $(READY)
	$(RUN)/python -m pytest bench --benchmark-only

clean:
	rm -rf $(VENV) build dist *.egg-info pcmecl_fast/*.so
