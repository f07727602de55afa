.DEFAULT_GOAL := help
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := out/demo
GGUF := models/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help demo test lint api matrix bench bench-mla bench-smaller bench-gpu torture clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /  make \1\t/' | expand -t 16

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.user: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $(VENV)/.user $@

$(GGUF): | $(VENV)/.user
	$(BIN)/python benchmarks/fetch.py smollm2

$(VENV)/.bench: $(VENV)/.dev
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,bench]'
	touch $@

demo: $(VENV)/.user $(GGUF) ## install, fetch SmolLM2-135M, compress it, compare it, and let the result answer a prompt
	$(BIN)/compress-model recipes/demo.yaml -o $(DEMO)
	TQDM_DISABLE=1 $(BIN)/python benchmarks/answer.py $(DEMO) "What is the capital of France?"

lint: $(VENV)/.dev ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

test: lint $(GGUF) ## everything, from nothing: lint, types, the quick tests, then the real model
	$(BIN)/python -m pytest -q -m "not real" -n 2 --ignore=tests/kernels
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n 2 tests/kernels
	$(BIN)/python -m pytest -q -m real -n 2 --dist loadfile

$(VENV)/.docs: $(VENV)/.dev
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,docs]'
	touch $@

api: $(VENV)/.docs ## pages of all public docstrings, in out/api
	$(BIN)/pdoc --output-directory out/api compiler.job compiler.frontend.capture compiler.pipeline compiler.recipe \
	  compiler.ir.graph compiler.ir.facts compiler.ir.select compiler.ir.execute compiler.rewrite compiler.weights.expr \
	  compiler.weights.ops.basic compiler.calibration compiler.evaluate passes backends.safetensors.emission \
	  backends.torch_module.generate backends.onnx.emission backends.onnx.runner backends.gguf

matrix: $(VENV)/.dev ## which pass goes with which family and target, written to docs/matrix.md
	$(BIN)/python -m tests.matrix

bench: $(VENV)/.user $(GGUF) ## measure what README's tables say
	$(BIN)/python benchmarks/exactness.py
	$(BIN)/python benchmarks/scale.py
	$(BIN)/python benchmarks/streaming.py
	$(BIN)/python benchmarks/quality.py

bench-mla: $(VENV)/.user $(GGUF) ## compare latent attention with published conversions: hours
	$(BIN)/python benchmarks/fetch.py wikipedia austen brown
	$(BIN)/python benchmarks/mla.py --seeds 0 1 2

bench-smaller: $(VENV)/.bench $(GGUF) ## compare factorised, pruned and sparse models with published methods: hours
	$(BIN)/python benchmarks/fetch.py wikipedia austen brown minilm dinov2 whisper fashion speech
	$(BIN)/python benchmarks/low_rank.py --seeds 0 1 2
	$(BIN)/python benchmarks/prune.py --seeds 0 1 2
	$(BIN)/python benchmarks/prune_speed.py
	$(BIN)/python benchmarks/sparsify.py --seeds 0 1 2
	$(BIN)/python benchmarks/encoders.py
	$(BIN)/python benchmarks/transforms.py
	$(BIN)/python benchmarks/tokens.py

bench-gpu: $(VENV)/.bench ## measure the kernels on this machine's GPU
	$(BIN)/python benchmarks/gpu.py
	$(BIN)/python benchmarks/gpu_decode.py

torture: $(VENV)/.dev ## kill, starve and lie to the program some three thousand times: three quarters of an hour of two busy cores, less of quiet ones
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.torture

clean: ## remove the environment, fetched models and outputs
	rm -rf $(VENV) models data out
