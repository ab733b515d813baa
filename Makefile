# Every target first sets up what it needs in .venv; that is skipped while nothing it depends on has changed.
#   make demo    train a small vision transformer with AdamW and with MetaAdamW (ARGS="--task etth1 --data DIR", ARGS="--optimizer mada")
#   make test    all tests, a file at a time on each of two processes (ARGS="tests/test_ops.py -k bf16", JOBS=8)
#   make bench   the measured tables (RESULTS=bench/results/MACHINE: where they go)
#   make cuda-on-cpu   the CUDA kernels on the CPU: sanitizers, broken kernels, lines that no test reaches (ARGS="--cases 5000")
#   make gpu-check   build, tests, sanitizer and tables on a machine with a GPU, with the torch that is there: no $(VENV), no network
#   make lint    style, format and types
# Another torch, 2.11 or later: make TORCH="torch==2.12.0".

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
ARGS ?=
JOBS ?= 2
RESULTS ?= bench/results/local
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/*.h csrc/*.cpp csrc/*.cu csrc/*.cuh)

.PHONY: demo test bench cuda-on-cpu gpu-check lint clean

demo: $(VENV)/.ready
	$(BIN)/python examples/demo.py $(ARGS)

test: $(VENV)/.ready
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

bench: $(VENV)/.ready
	mkdir -p $(RESULTS)
	$(BIN)/python -m bench.step --json $(RESULTS)/step.json --png $(RESULTS)/step.png $(ARGS)
	$(BIN)/python -m bench.mada --json $(RESULTS)/mada.json
	$(BIN)/python -m bench.encoder --json $(RESULTS)/encoder.json
	$(BIN)/python -m bench.sharded_step --json $(RESULTS)/sharded_step.json
	$(BIN)/python -m bench.meta_update --json $(RESULTS)/meta_update.json
	$(BIN)/python -m pytest bench --benchmark-only

cuda-on-cpu: $(VENV)/.ready
	$(BIN)/python -m tests.cuda_on_cpu $(ARGS)

# Writes bench/results/<device>/. PYTHON is the one that has torch, triton, pytest.
gpu-check:
	$(PYTHON) -m bench.gpu_check $(ARGS)

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(SOURCES) $(wildcard tests/*.cpp tests/cuda_on_cpu/*.h tests/cuda_on_cpu/*.cpp)

clean:
	rm -rf $(VENV) build dist *.egg-info metaadamw_fast/_C*.so

# torch comes first and the build is not isolated: see pyproject.toml.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)" "setuptools>=77" ninja
	touch $@

$(VENV)/.ready: $(VENV)/.torch setup.py pyproject.toml $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[demo,lint,test]"
	touch $@
