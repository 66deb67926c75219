PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL ?= gemma-3-270m
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help demo test check model proto format baselines compose-test overhead steps invariance peers shocks routers
.PHONY: gpu gpu-test gpu-bench clean
help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

# Two stamps: what a user runs needs less than what a developer runs.
$(VENV)/.run: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[worker,embedded,convert]"
	@touch $@
$(VENV)/.dev: $(VENV)/.run
	$(PIP) -e ".[worker,embedded,convert,train,dev]"
	@touch $@

model: $(VENV)/.run  ## download and prepare Gemma 3 270M (once; Gemma terms)
	$(BIN)/dspark models pull $(MODEL)

demo: model  ## serve a real model in four processes and watch it speculate
	$(BIN)/dspark demo

# Whole clusters, and rounds against the clock, need the machine to themselves; the rest takes a core each, longest first.
ALONE := tests/integration tests/services/router tests/benchmarks
test: $(VENV)/.dev model  ## every test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --durations=25 -n auto --dist loadfile $(ALONE:%=--ignore=%) tests/training tests/kernels tests
	$(BIN)/python -m pytest -q --durations=25 $(ALONE)

gpu: $(VENV)/.dev
	@$(BIN)/python -c "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 'no CUDA device: these targets need one, and a CUDA build of torch in $(VENV)')"

gpu-test: gpu model  ## on a card: the kernels compiled, and every integration test
	$(BIN)/python -m pytest -q --durations=25 -m gpu
	DSPARK_DEVICE=cuda $(BIN)/python -m pytest -q --durations=25 tests/integration

gpu-bench: gpu  ## on a card: kernels against references and bandwidth [JSON=gpu-bench.json]
	$(BIN)/python -m benchmarks.kernels --json $(or $(JSON),gpu-bench.json)

check: $(VENV)/.dev  ## lint, format, types, generated stubs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev  ## rewrite to the project's format
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

proto: $(VENV)/.dev  ## regenerate dspark/v1 from proto/
	$(BIN)/python -m grpc_tools.protoc --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy -Iproto --python_out=. --grpc_python_out=. --mypy_out=quiet:. proto/dspark/v1/*.proto

overhead: $(VENV)/.run model  ## where a round's time goes, at 1, 8 and 32 streams [ARGS="…"]
	$(BIN)/python -m benchmarks.overhead $(ARGS)

steps: $(VENV)/.run model  ## what a verify and a draft step take beside what the machine could do [ARGS="--weights int8"]
	$(BIN)/python -m benchmarks.steps $(ARGS)

invariance: $(VENV)/.run model  ## 200 completions alone and in batches of 2 to 32: equal token ids [ARGS="…"]
	$(BIN)/python -m benchmarks.invariance $(ARGS)

shocks: $(VENV)/.run model  ## outside load that comes and goes, one frozen step: how fast costs follow [ARGS="…"]
	$(BIN)/python -m benchmarks.shocks $(ARGS)

routers: $(VENV)/.run model  ## two routers over one verify worker against one, throughput and tokens [ARGS="…"]
	$(BIN)/python -m benchmarks.routers $(ARGS)

peers: $(VENV)/.run model  ## against vLLM, llama.cpp, …: PROMPTS=file PEERS="vllm=venv …" [GGUF=file JSON=file ARGS="…"], see docs/peers.md
	@test -n "$(PROMPTS)" || { echo 'make peers needs PROMPTS=FILE.jsonl, see docs/peers.md' >&2; exit 2; }
	$(BIN)/python -m benchmarks.peers --prompts $(PROMPTS) --template qa $(PEERS:%=--peer %) $(GGUF:%=--gguf %) $(JSON:%=--json %) $(ARGS)

baselines: $(VENV)/.dev model  ## train DFlash, Eagle3, MTP and DSpark alike: PROMPTS=file [BLOCKS=300000 OUT=runs LAYERS=2 SEQUENCES=4 DATA="sets"]
	OUT=$(or $(OUT),runs) BLOCKS=$(or $(BLOCKS),300000) PROMPTS=$(PROMPTS) BIN=$(BIN) MODEL=$(MODEL) LAYERS=$(or $(LAYERS),2) SEQUENCES=$(or $(SEQUENCES),4) DATA="$(DATA)" bash benchmarks/baselines.sh

compose-test: $(VENV)/.run model  ## the docker-compose cluster, two workers in each pool, from the host
	bash deploy/test_compose.sh

clean:  ## remove what make made (the model cache stays)
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
