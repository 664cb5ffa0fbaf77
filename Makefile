# Everything that can be run here. `make` lists it; the first target that needs packages creates $(VENV).
#   make test VENV=            use the environment that is active instead
#   make test WORKERS=8        more processes
#   make gpu RESULTS=out           on a machine with a GPU; creates no environment

SHELL := bash -o pipefail
VENV ?= .venv
WORKERS ?= 2
RESULTS ?= benchmarks/results
# What the suite and the measurements are known with. pip takes the build of torch that its index prefers.
TORCH ?= torch==2.13.0
TRL ?= trl==1.16.0
TRITON ?= triton==3.9.0
# verl has an environment of its own: it needs other releases than TRL, and Python 3.10 to 3.12.
VERL_VENV ?= .venv-verl
VERL ?= verl==0.9.1
VERL_OLDEST ?= verl==0.8.0
# verl's Megatron engine has one, too: Megatron-Core comes with much that verl for FSDP goes without.
MEGATRON_VENV ?= .venv-megatron
MEGATRON ?= megatron-core==0.16.1 mbridge==0.15.1
# verl's default bridge needs Python 3.12 and a newer Megatron-Core. Of what it depends on, some is for GPUs only.
BRIDGE_VENV ?= .venv-bridge
BRIDGE_PYTHON ?= python3.12
BRIDGE ?= megatron-bridge==0.5.1 megatron-core==0.18.2
MODELOPT ?= nvidia-modelopt==0.44.0

ifneq ($(VENV),)
export PATH := $(abspath $(VENV))/bin:$(PATH)
INSTALLED := $(VENV)/.installed
endif
ifneq ($(VERL_VENV),)
VERL_INSTALLED := $(VERL_VENV)/.installed
test-verl test-verl-oldest quickstart-verl $(VERL_INSTALLED): export PATH := $(abspath $(VERL_VENV))/bin:$(PATH)
endif
ifneq ($(MEGATRON_VENV),)
MEGATRON_INSTALLED := $(MEGATRON_VENV)/.installed
test-megatron $(MEGATRON_INSTALLED): export PATH := $(abspath $(MEGATRON_VENV))/bin:$(PATH)
endif
ifneq ($(BRIDGE_VENV),)
BRIDGE_INSTALLED := $(BRIDGE_VENV)/.installed
test-bridge $(BRIDGE_INSTALLED): export PATH := $(abspath $(BRIDGE_VENV))/bin:$(PATH)
endif
# The suite's tensors are tiny: one thread per process. Nothing here needs a hub.
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 python -m pytest
# Deprecation notes of the libraries among themselves are no news to a user.
QUIET := HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore TRANSFORMERS_VERBOSITY=error

.DEFAULT_GOAL := help
.PHONY: help venv test test-long test-slow test-verl test-verl-oldest test-megatron test-bridge lint docs
.PHONY: wheel-check quickstart quickstart-lora quickstart-verl bench
.PHONY: quickstart-diffusion quickstart-hybrid quickstart-images bench-images bench-hybrid bench-step bench-offline bench-streamed bench-balance bench-nat bench-diffusion
.PHONY: families gpu gpu-trl gpu-more gpu-dry gpu-wheels

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 22

venv: $(INSTALLED) ## create the virtual environment (the others do so by themselves)

ifneq ($(VENV),)
$(VENV)/.installed: pyproject.toml
	test -d $(VENV) || python3 -m venv $(VENV)
	python -m pip install --quiet $(TORCH)
	python -m pip install --quiet --editable '.[trl,dev]' $(TRL) $(TRITON)
	touch $@
endif

ifneq ($(VERL_VENV),)
$(VERL_VENV)/.installed: pyproject.toml
	test -d $(VERL_VENV) || python3 -m venv $(VERL_VENV)
	python -m pip install --quiet $(TORCH)
	python -m pip install --quiet --editable '.[verl,test]' $(VERL)
	touch $@
endif

ifneq ($(MEGATRON_VENV),)
$(MEGATRON_VENV)/.installed: pyproject.toml
	test -d $(MEGATRON_VENV) || python3 -m venv $(MEGATRON_VENV)
	python -m pip install --quiet $(TORCH)
	python -m pip install --quiet --editable '.[megatron,test]' $(VERL) $(MEGATRON)
	touch $@
endif

ifneq ($(BRIDGE_VENV),)
$(BRIDGE_VENV)/.installed: pyproject.toml
	test -d $(BRIDGE_VENV) || $(BRIDGE_PYTHON) -m venv $(BRIDGE_VENV)
	python -m pip install --quiet $(TORCH)
	python -m pip install --quiet --editable '.[megatron,test]' $(VERL) $(MODELOPT)
	python -m pip install --quiet --no-deps $(BRIDGE)
	touch $@
endif

test: $(INSTALLED) ## the test suite, on a CPU
	$(PYTEST) --numprocesses $(WORKERS) --dist loadfile

test-long: $(INSTALLED) ## other releases, launchers, benchmarks and compiled kernels: minutes each
	$(PYTEST) --numprocesses $(WORKERS) --dist loadfile -m "long and not slow and not gpu"

test-slow: $(INSTALLED) ## long fuzzing and many trainer runs
	$(PYTEST) --numprocesses $(WORKERS) --dist worksteal -m "slow and not gpu"

test-verl: $(VERL_INSTALLED) ## the adapter for verl, up to its whole training loop, on a CPU; creates .venv-verl
	$(PYTEST) --numprocesses $(WORKERS) --dist loadfile $(wildcard tests/adapters/verl*) tests/adapters/test_imports.py

test-megatron: $(MEGATRON_INSTALLED) ## the adapter for verl's Megatron engine, on a CPU, minutes; creates .venv-megatron
	$(PYTEST) --numprocesses $(WORKERS) --dist loadfile -m "not slow and not gpu" tests/adapters/megatron

test-bridge: $(BRIDGE_INSTALLED) ## the same with Megatron-Bridge and LoRA, minutes; needs Python 3.12, creates .venv-bridge
	$(PYTEST) tests/adapters/megatron/test_bridge.py

# The same environment, with the older verl in front of the newer one.
OVERLAY := $(abspath $(or $(VERL_VENV),build))/$(subst ==,-,$(VERL_OLDEST))
OLDEST := test_activation.py test_balance.py test_equality.py::test_every_step_is_equal
test-verl-oldest: $(VERL_INSTALLED) ## equality, balancing and training loop with the oldest verl supported, likewise
	test -d $(OVERLAY) || python -m pip install --quiet --no-deps --target $(OVERLAY) $(VERL_OLDEST)
	PYTHONPATH=$(OVERLAY) $(PYTEST) --numprocesses $(WORKERS) --dist loadfile -k "not lora" \
		tests/adapters/verl_cpu/test_quickstart.py::test_plugin $(addprefix tests/adapters/verl/,$(OLDEST))

families: $(INSTALLED) ## every causal family of transformers, exact or refused and why: docs/families.md
	OMP_NUM_THREADS=1 $(QUIET) python -m tests.support.sweep --write docs/families.md

# From the wheel alone, away from the checkout: what a user of PyPI gets. torch comes as pip prefers it.
PYTHON ?= python3
WHEEL_TOOLS := $(abspath build/wheel-tools)/bin
WHEEL_VENV := $(abspath build/wheel-venv)
WHEEL_USE := build/wheel-use
wheel-check: export PATH := $(WHEEL_VENV)/bin:$(PATH)
wheel-check: export PYTHONPATH :=
wheel-check: ## build sdist and wheel into dist/; with $(PYTHON), install the wheel in a new environment and train
	rm -rf dist $(dir $(WHEEL_TOOLS)) $(WHEEL_VENV) $(WHEEL_USE)
	$(PYTHON) -m venv $(dir $(WHEEL_TOOLS))
	$(WHEEL_TOOLS)/python -m pip install --quiet build twine check-wheel-contents
	$(WHEEL_TOOLS)/python -m build --quiet --outdir dist .
	$(WHEEL_TOOLS)/twine check --strict dist/*
	$(WHEEL_TOOLS)/check-wheel-contents --package dta_plugin dist/*.whl
	$(PYTHON) -m venv $(WHEEL_VENV)
	python -m pip install --quiet $(TORCH) "$$(ls dist/*.whl)[trl]"
	mkdir $(WHEEL_USE) && cp -r recipes tests/installed.py $(WHEEL_USE)
	cd $(WHEEL_USE) && dta doctor && dta inspect recipes/rollouts/agent.jsonl --html tree.html
	cd $(WHEEL_USE) && $(QUIET) python installed.py
	cd $(WHEEL_USE) && python recipes/quickstart/build.py --output runs/quickstart --steps 20
	cd $(WHEEL_USE) && $(QUIET) trl grpo --config recipes/trl/quickstart.yaml --max_steps 4 \
		| python recipes/quickstart/watch.py | tee watched
	grep --quiet "dta: in this training" $(WHEEL_USE)/watched

docs: $(INSTALLED) ## the documentation as a site, in build/site; fails on a broken link
	NO_MKDOCS_2_WARNING=1 mkdocs build --quiet
	@echo "open build/site/index.html; with search: python -m http.server --directory build/site"

lint: $(INSTALLED) ## style and types
	ruff check .
	ruff format --check .
	mypy

quickstart: $(INSTALLED) ## train a small model with GRPO and the flag, on a CPU; draws its reward curve
	python recipes/quickstart/build.py --output runs/quickstart
	$(QUIET) trl grpo --config recipes/trl/quickstart.yaml | python recipes/quickstart/watch.py
	$(QUIET) python recipes/quickstart/speed.py recipes/trl/quickstart.yaml
	python recipes/quickstart/report.py runs/quickstart

quickstart-lora: $(INSTALLED) ## the same with LoRA
	python recipes/quickstart/build.py --output runs/quickstart
	$(QUIET) trl grpo --config recipes/trl/quickstart_lora.yaml | python recipes/quickstart/watch.py
	$(QUIET) python recipes/quickstart/speed.py recipes/trl/quickstart_lora.yaml
	python recipes/quickstart/report.py runs/quickstart --run lora

quickstart-hybrid: $(INSTALLED) ## the same with a tiny Qwen3.5, which has a recurrent layer
	$(QUIET) python recipes/quickstart/build.py --output runs/quickstart_hybrid --hybrid --steps 300
	$(QUIET) trl grpo --config recipes/trl/quickstart_hybrid.yaml | python recipes/quickstart/watch.py
	python recipes/quickstart/report.py runs/quickstart_hybrid

quickstart-images: $(INSTALLED) ## a tiny Qwen3-VL learns to count shapes in pictures; HYBRID=1: a tiny Qwen3.5
	$(QUIET) python recipes/quickstart/build_images.py --output runs/quickstart_images $(if $(HYBRID),--hybrid)
	$(QUIET) trl grpo --config recipes/trl/quickstart_images.yaml | python recipes/quickstart/watch.py
	$(QUIET) python recipes/quickstart/speed.py recipes/trl/quickstart_images.yaml
	python recipes/quickstart/report.py runs/quickstart_images

quickstart-diffusion: $(INSTALLED) ## RL of a small diffusion language model, on a CPU
	python recipes/quickstart/diffusion.py --output runs/quickstart_diffusion
	$(QUIET) python recipes/trl/diffusion.py --config recipes/trl/quickstart_diffusion.yaml | python recipes/quickstart/watch.py

quickstart-verl: $(VERL_INSTALLED) ## the same with verl: its own training loop, two FSDP2 ranks; creates .venv-verl
	python recipes/quickstart/build.py --output runs/quickstart
	python recipes/verl/build.py runs/quickstart
	$(QUIET) recipes/verl/quickstart.sh 2>&1 | python recipes/quickstart/watch.py
	python recipes/quickstart/report.py runs/quickstart --run verl

bench: $(INSTALLED) ## measure the policy update, dense against tree
	python -m benchmarks.policy_update

bench-hybrid: $(INSTALLED) ## the same for the layers of Qwen3.5
	python -m benchmarks.policy_update --model small-hybrid --contenders trl dense nodes tree --rounds 3 \
		--rows 1024/64/8 1024/256/8 "no sharing" comb rollouts

bench-step: $(INSTALLED) ## measure whole GRPO steps: sampling, scoring, update
	OMP_NUM_THREADS=1 python -m benchmarks.whole_step

bench-offline: $(INSTALLED) ## measure SFT and DPO steps through TRL's own trainers
	OMP_NUM_THREADS=1 python -m benchmarks.offline

bench-images: $(INSTALLED) ## measure the policy update of a group that shares an image
	OMP_NUM_THREADS=1 python -m benchmarks.images

bench-streamed: $(INSTALLED) ## measure streamed execution: what bounded memory costs; against one path at a time
	python -m benchmarks.streamed

bench-balance: $(INSTALLED) ## measure how evenly sequences are dealt out, against other ways to deal
	python -m benchmarks.balance

bench-nat: $(INSTALLED) ## measure updates on half of the tokens: time, memory, noise, learning curves
	python -m benchmarks.token_selection.updates
	test -d runs/quickstart/model || python recipes/quickstart/build.py --output runs/quickstart
	python -m benchmarks.token_selection.variance
	python -m benchmarks.token_selection.learning

bench-diffusion: $(INSTALLED) ## measure updates of a diffusion LM: memory against the number of samples, learning curves
	python -m benchmarks.diffusion.memory
	test -d runs/quickstart_diffusion/model || python recipes/quickstart/diffusion.py --output runs/quickstart_diffusion
	python -m benchmarks.diffusion.learning
	test -d runs/diffusion/model || python recipes/verl/diffusion.py runs/diffusion
	python -m benchmarks.diffusion.objectives

# On a machine with a GPU: nothing is installed, and python3 is the one that holds torch. See benchmarks/gpu.
#   make gpu RESULTS=out GPU_OPTIONS='--commit 1a2b3c4 --rollouts rollouts.jsonl.gz'
GPU_RUN = python3 -m benchmarks.gpu $(1) --output $(RESULTS) $(GPU_OPTIONS)
gpu: ## tests and measurements on a CUDA device, ten minutes at most; needs no TRL; results in $(RESULTS)
	$(call GPU_RUN,op)

gpu-trl: ## whole policy updates on a CUDA device, ten minutes at most; with TRL, or with what gpu-wheels downloaded
	$(call GPU_RUN,trl)

gpu-more: ## token selection and diffusion LMs on a CUDA device
	$(call GPU_RUN,more)

gpu-dry: ## every step of these without a GPU, tiny; all kernel variants are compiled
	status=0; for plan in op trl more; do $(call GPU_RUN,$$plan) --dry || status=1; done; exit $$status

# What TRL needs and a machine with torch, transformers and the usual data packages lacks, for that machine's Python.
GPU_PYTHON ?= 3.12
GPU_WHEELS := $(TRL) datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19 peft==0.21.2 accelerate==1.15.0 \
	prefix-grouper==0.0.1.post1
gpu-wheels: ## download wheels (4 MB, ignored by git) for gpu-trl on a machine without a network
	rm -rf wheels
	python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version $(GPU_PYTHON) --dest wheels $(GPU_WHEELS)
