# make demo, make test, make test-compose, make chaos; make setup is the installation that all need.
VENV   := .venv
PYTHON ?= python3.11
PIP    := $(VENV)/bin/python -m pip
# Where torch's CPU build comes from, if pip is not configured for it:
#   make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
ARGS   ?=

.PHONY: demo test test-compose chaos setup lint check-types clean

demo: setup
	$(VENV)/bin/headrace up configs/tiny-cpu.yaml $(ARGS)

# Two processes, each with one thread of torch's: more would wait for one another, spinning.
test: setup lint check-types
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m "not slow and not compose" --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# The images' torch: from TORCH_INDEX if that is set, else from its public place.
test-compose: setup
	$(VENV)/bin/python -m pytest -m compose --exitfirst -s $(ARGS)

chaos: setup
	$(VENV)/bin/python -m chaos $(ARGS)

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

check-types: setup
	$(VENV)/bin/mypy headrace chaos benchmarks tests

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip
	$(PIP) install --quiet --constraint constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
	    --editable '.[learner,generation,launcher,engine-cpu,dev]'
	$(PIP) install --quiet --no-deps sglang==0.5.23
	$(PIP) install --quiet --no-deps --upgrade --target $(VENV)/sglang-cpu torchvision==0.28.0
	touch $@

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
