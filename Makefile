# Each target makes .venv if it is missing. PYTHON=python3.12 make setup picks another interpreter.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# Python compiles what is imported when it is imported; compiling all of torch and transformers beforehand takes longer.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-warn-script-location --no-compile -c constraints.txt
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: setup demo demo-vl test test-full lint format generated docs bench clean help

help:
	@echo "make setup      .venv with the tested versions, the core, the plugins, and the example plugins as wheels"
	@echo "make demo       train a tiny Wan2.2 on two real clips and look at it (some minutes)"
	@echo "make demo-vl    train a tiny Qwen3-VL on eight photographs, and ask it what they show, before and after (two minutes)"
	@echo "make test       the tests; make test-full runs the slow ones too"
	@echo "make lint       ruff, mypy, import-linter"
	@echo "make bench      our training step against a plain loop, sharded and not; finding plugins; checking a configuration; weights"
	@echo "make generated  the pages and schemas that are written from the code"
	@echo "make docs       the documentation as HTML in site/"

setup: $(VENV)/.setup

$(VENV)/.setup: constraints.txt pyproject.toml registry/pyproject.toml mm_plugins/wan22/pyproject.toml mm_plugins/qwen3vl/pyproject.toml $(shell find examples/plugins -path '*/mm_plugin_*.py' -o -name pyproject.toml)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: MM Zoo needs Python 3.11 or newer; say which: make setup PYTHON=/path/to/python3.11"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) "setuptools>=77.0.3" wheel
	$(PIP) --no-build-isolation -e ./registry -e . -e ./mm_plugins/wan22 -e ./mm_plugins/qwen3vl
	rm -rf $(VENV)/wheels && $(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation -w $(VENV)/wheels ./examples/plugins/mmzoo-plugin-haar ./examples/plugins/mmzoo-plugin-ltx
	$(PIP) --no-deps --force-reinstall $(VENV)/wheels/*.whl
	@touch $@

$(VENV)/.dev: $(VENV)/.setup requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	@touch $@

demo: $(VENV)/.setup
	$(BIN)/python examples/tiny/wan22-t2v/demo.py

demo-vl: $(VENV)/.setup
	$(BIN)/python examples/tiny/qwen3vl/demo.py

# Most of the time goes into starting processes, so tests run side by side, each with one thread.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

test: $(VENV)/.dev
	$(PYTEST) -m "not slow"

test-full: $(VENV)/.dev
	$(PYTEST)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Pages and files that are written from the code; tests compare.
generated: $(VENV)/.dev
	$(BIN)/python -m mm_core.config.reference docs/configuration-reference.md
	$(BIN)/python -m mm_core.testing.catalogue docs/conformance.md
	for kind in job model data tools fsdp2 inference transformers; do $(BIN)/mm schema $$kind --output examples/schemas/$$kind.schema.json || exit; done

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/wan_step.py --only same
	$(BIN)/python benchmarks/sharding.py
	$(BIN)/python benchmarks/parallel.py
	$(BIN)/python benchmarks/discovery.py
	$(BIN)/python benchmarks/config.py
	$(BIN)/python benchmarks/weights.py
	$(BIN)/python benchmarks/vlm_step.py

docs: $(VENV)/.dev
	$(PIP) mkdocs-material==9.8.1
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build site *.egg-info
