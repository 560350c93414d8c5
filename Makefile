# make install   the package and its development tools in .venv, with the native extension
# make demo      quantizes a small model that comes with the project and compares it with the original; offline
# make test      the tests
# make lint      formatting, lint, types
# make format    formats Python and C++

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
NATIVE := $(wildcard csrc/*.* csrc/*/*.*)
NATIVE_TESTS := $(wildcard tests/native/*.*)
READY := $(VENV)/.installed

.PHONY: install demo test lint format clean

install: $(READY)

# torch comes first: the extension is built with the torch that runs it. In the mode compat, Python finds the package
# even beside a directory that has its name, such as this one.
$(READY): setup.py pyproject.toml constraints.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch ninja pybind11 setuptools
	@echo 'building the native extension: some two minutes, with a CUDA toolkit ten'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --config-settings editable_mode=compat \
		--editable '.[dev]'
	@$(BIN)/python -c 'from autoq.extension import extension_missing; print("native extension:", extension_missing() or "built")'
	touch $@

demo: $(READY)
	$(BIN)/python examples/demo/demo.py

# One thread a worker: the models of the tests are too small for more.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(NATIVE) $(NATIVE_TESTS)

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE) $(NATIVE_TESTS)

clean:
	rm -rf $(VENV) build *.egg-info autoq/*.so
