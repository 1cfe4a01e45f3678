# Needs python3.11 or newer and make; everything else goes into .venv.
# BACKEND=metal|cpu|cuda12|cuda13 overrides the MLX build that is chosen for this machine.

PORT ?= 8000
MODEL ?= demo
ARGS ?=
TESTS ?=
BIN := .venv/bin
# MLX's CPU build is slow without a fast BLAS loaded before it; the server does this for its engine by itself
BLAS := eval "$$($(BIN)/python -m vllm_mlx.runner.blas)" &&

.DEFAULT_GOAL := help
.PHONY: help setup demo serve chat check test test-full bench docs fix lock

help:
	@echo "make demo [PORT=8000]                       serve the small demo model"
	@echo "make serve MODEL=... [PORT=...] [ARGS=...]  serve any model"
	@echo "make chat [MODEL=...]                       talk to a model in the terminal"
	@echo "make check                                  style, types, layers, generated docs, size rules"
	@echo "make test [TESTS=tests/cli]                 check, and every fast test"
	@echo "make test-full                              the slow tests too"
	@echo "make bench | docs | fix | lock              figures, generated docs, automatic fixes, lock files"

setup:
	@sh tools/setup.sh

demo: setup
	@exec $(BIN)/vllm-mlx serve demo --port $(PORT) $(ARGS)

serve: setup
	@exec $(BIN)/vllm-mlx serve "$(MODEL)" --port $(PORT) $(ARGS)

chat: setup
	@exec $(BIN)/vllm-mlx chat "$(MODEL)" $(ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/python tools/docs.py --check
	$(BIN)/pytest -q tests/test_rules.py

test: check
	$(BLAS) $(BIN)/pytest -m "not slow" $(TESTS)

test-full: check
	$(BLAS) $(BIN)/pytest $(TESTS)

bench: setup
	$(BLAS) $(BIN)/python benchmarks/compare_servers.py $(ARGS)

docs: setup
	$(BIN)/python tools/docs.py

fix: setup
	$(BIN)/ruff check --fix .

lock: setup
	sh tools/lock.sh $(BIN)/uv $(ARGS)
