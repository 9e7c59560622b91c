# make demo: train the digits model and look at what it draws. make test: the tests.
# Both set up everything they need in .venv on the first run.

PYTHON ?= python3
BIN := .venv/bin
RUN := outputs/digits_edm
# Bytecode is kept, whatever the environment says: tests start scores of processes that import torch.
export PYTHONDONTWRITEBYTECODE =

.PHONY: demo test test-slow lint docs bench clean

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/.ready
	$(BIN)/vdiff train configs/digits_edm.yaml --out $(RUN)
	$(BIN)/vdiff sample $(RUN) --num 100 --out $(RUN)/samples.png
	$(BIN)/vdiff evaluate $(RUN)
	@echo "Look at $(RUN)/samples.png"

test: .venv/.ready
	VDIFF_REQUIRE_PEERS=1 $(BIN)/python -m pytest -n 2 -m "not gpu and not slow"

test-slow: .venv/.ready
	VDIFF_REQUIRE_PEERS=1 $(BIN)/python -m pytest -m "slow and not gpu"

lint: .venv/.ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

docs: .venv/.ready
	$(BIN)/python -m sphinx -W --keep-going docs outputs/docs
	@echo "Open outputs/docs/index.html"

bench: .venv/.ready
	$(BIN)/python benchmarks/sampler_overhead.py --out docs/benchmarks/sampler_overhead.md
	$(BIN)/python benchmarks/forward.py --out docs/benchmarks/forward.md
	$(BIN)/python benchmarks/mixins.py --out docs/benchmarks/mixins.md

clean:
	rm -rf .venv outputs
