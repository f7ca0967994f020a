# Everything a person repeats. `make demo` and `make test` do all their own set-up.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo test lint bench bench-check clean
setup: $(READY)

$(READY): pyproject.toml setup.py
	test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel
	$(RUN)/python -m pip install --quiet "torch>=2.11"
	# Built against the torch that was just installed, not against one that pip would fetch for the build alone.
	$(RUN)/python -m pip install --quiet --no-build-isolation --editable ".[test,bench,video,dev]"
	touch $@

demo: $(READY)
	$(RUN)/pcmecl-fast demo

test: $(READY)
	$(RUN)/python -m pytest

lint: $(READY)
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .
	$(RUN)/mypy

bench: $(READY)
	$(RUN)/python -m pytest bench --benchmark-only

# Instructions of the CPU kernels against the accepted ones: sees a slowdown on any machine, however busy.
bench-check: $(READY)
	$(RUN)/python -m bench.instructions

clean:
	rm -rf $(VENV) build dist *.egg-info
