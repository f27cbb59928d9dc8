# Each target sets up .venv by itself, once. PYTHON chooses the interpreter (3.11 or newer for these pins),
# TORCH the build of torch: `make test TORCH=torch==2.13.0` takes the ordinary one whatever the machine.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PINS := configs/pins.txt

TORCH_VERSION := $(shell sed -n 's/^torch==//p' $(PINS))
ifeq ($(shell uname -s)$(shell command -v nvidia-smi),Linux)
TORCH ?= torch==$(TORCH_VERSION)+cpu
else
TORCH ?= torch==$(TORCH_VERSION)
endif

RELEASE_TORCH ?= torch

.PHONY: help demo test slow torch lerobot lint format bench docs release-check clean

help:
	@echo "make demo    two photographs exchange their colours: out/demo.png, and a table beside POT"
	@echo "make test    the test suite (make slow for the rest)"
	@echo "make torch   what of the suite matters where numba is not installed, without it"
	@echo "make lerobot the tests with LeRobot itself, in an environment of their own: .venv-lerobot, 1.5 GB"
	@echo "make lint    ruff and basedpyright (make format repairs what can be)"
	@echo "make docs    the site in docs/_build/html: offline, every example run, warnings are errors; in .venv-docs"
	@echo "make release-check  the wheel: built, looked into, and used on each Python from 3.10 to 3.13 that is found"
	@echo "make bench   the dense solver against POT on this CPU"

demo: .venv/ready
	$(BIN)/gpu-ot demo

test: .venv/ready
	$(BIN)/pytest

slow: .venv/ready
	$(BIN)/pytest -m slow

torch: .venv/ready
	$(BIN)/pytest --without-numba tests/test_solver.py tests/test_loop.py tests/test_backends.py tests/test_bregman.py \
	  tests/test_unbalanced.py tests/test_losses.py tests/test_divergence.py tests/test_gradients.py

lerobot: .venv-lerobot/ready
	OMP_NUM_THREADS=1 .venv-lerobot/bin/pytest tests/test_lerobot_pairs.py tests/test_lerobot_train.py

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/ready
	$(BIN)/python bench/dense_cpu.py

docs: .venv-docs/ready
	rm -rf docs/_build docs/api docs/gallery docs/pictures
	OMP_NUM_THREADS=1 .venv-docs/bin/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	.venv-docs/bin/python docs/check_links.py docs/_build/html

release-check:
	PYTHON=$(PYTHON) TORCH=$(RELEASE_TORCH) .ci/release-check

clean:
	rm -rf .venv .venv-lerobot .venv-docs .release out build *.egg-info docs/_build docs/api docs/gallery docs/pictures

.venv-docs/ready: pyproject.toml configs/pins.txt configs/pins_docs.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" -r configs/pins_docs.txt
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check -c $(PINS) setuptools
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check -c $(PINS) --no-build-isolation -e ".[docs]"
	@touch $@

# LeRobot's releases ask for an older torch than they work with, so it is installed without its requirements, which the pins name.
.venv-lerobot/ready: pyproject.toml configs/pins_lerobot.txt
	$(PYTHON) -m venv .venv-lerobot
	.venv-lerobot/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" -r configs/pins_lerobot.txt
	.venv-lerobot/bin/python -m pip install --quiet --disable-pip-version-check --no-deps lerobot==0.4.4
	.venv-lerobot/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

.venv/ready: pyproject.toml $(PINS)
	$(PYTHON) -m venv .venv
	@$(PIP) "$(TORCH)" || { \
	  echo; \
	  echo "pip cannot reach $(TORCH), torch without its several GB of CUDA packages, for this Python."; \
	  echo "Either let pip know PyTorch's index of CPU wheels (PIP_EXTRA_INDEX_URL), or take the ordinary build:"; \
	  echo "    make $(or $(MAKECMDGOALS),test) TORCH=torch==$(TORCH_VERSION)"; \
	  exit 1; }
	$(PIP) -c $(PINS) setuptools
	$(PIP) -c $(PINS) --no-build-isolation -e ".[test,demo,dev]"
	$(BIN)/gpu-ot compile
	@touch $@
