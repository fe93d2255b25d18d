# `make help` lists the targets; most of them run `make setup` first, which installs everything.
VENV   := .venv
PYTHON ?= python3.11
PIP    := $(VENV)/bin/python -m pip
# The index for torch's CPU build, if pip is not configured for it:
#   make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
# Additional arguments of the target's command: make demo ARGS="--seed 1"
ARGS   ?=

.PHONY: help setup demo demo-guessing test test-compose test-wheel chaos lint check-types clean

help: ## print this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(VENV)/installed ## install everything into .venv, for a machine without a GPU

# The demo's recipe uses the CPU even if there is a GPU.
demo: setup ## run the demo, two to three minutes on two CPU cores
	$(VENV)/bin/headrace up $(ARGS)

demo-guessing: setup ## run the demo of several turns, three minutes on two CPU cores
	$(VENV)/bin/headrace up configs/guessing-cpu.yaml $(ARGS)

# Three processes for two cores, because tests wait for processes that they start. Each has one torch thread: more threads
# would spin while they wait for each other.
test: setup lint check-types ## lint, types, and all tests except those that take minutes
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m "not slow and not compose" --numprocesses 3 --dist loadfile --no-loadscope-reorder $(ARGS)

# The images' torch comes from TORCH_INDEX if it is set, else from PyTorch's index.
test-compose: setup ## build the images and run the demo in them; needs a Docker engine
	$(VENV)/bin/python -m pytest -m compose --exitfirst -s $(ARGS)

test-wheel: ## install the wheel into an empty environment and use it outside the checkout
	TORCH_INDEX=$(TORCH_INDEX) .ci/wheel $(PYTHON)

chaos: setup ## runs in which processes are killed and connections cut
	$(VENV)/bin/python -m chaos $(ARGS)

lint: setup ## ruff
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

check-types: setup ## mypy
	$(VENV)/bin/mypy headrace chaos benchmarks tests

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip
	$(PIP) install --quiet --constraint constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
	    --editable '.[learner,generation,launcher,engine-cpu,dev]'
	$(PIP) install --quiet --no-deps sglang==0.5.23
	$(PIP) install --quiet --no-deps --upgrade --target $(VENV)/sglang-cpu torchvision==0.28.0
	touch $@

clean: ## remove the environment, the runs and all caches
	rm -rf $(VENV) build runs .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
