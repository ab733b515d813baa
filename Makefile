# Every target sets up what it needs in .venv, and does nothing again that is already there.
#   make demo    train a small vision transformer with AdamW and with MetaAdamW (ARGS="--task etth1 --data DIR")
#   make test    all tests      make bench   the measured tables      make lint   format, lint, types
# Another torch: make TORCH="torch==2.12.0"; it must be 2.11 or later.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/*)

.PHONY: demo test bench lint clean

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py $(ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest $(ARGS)

bench: $(VENV)/.test
	$(BIN)/python -m bench.step $(ARGS)
	$(BIN)/python -m bench.encoder
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-disable-gc

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(filter %.h %.cpp %.cu %.cuh,$(SOURCES))

clean:
	rm -rf $(VENV) build dist *.egg-info metaadamw_fast/_C*.so

# torch before the package, and the build not isolated: see pyproject.toml.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)" "setuptools>=77" ninja
	touch $@

$(VENV)/.built: $(VENV)/.torch setup.py pyproject.toml $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable .
	touch $@

$(VENV)/.demo $(VENV)/.test $(VENV)/.lint: $(VENV)/.%: $(VENV)/.built
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[$*]"
	touch $@
