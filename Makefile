# hessnb: each target makes the environment (.venv) itself. `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROFILE ?= quick

.DEFAULT_GOAL := help
.PHONY: help env book test lab check format bench clean

help:
	@echo "make book    execute the notebooks (profile $(PROFILE)) and build the HTML in book/_build/html; 15 to 25 minutes"
	@echo "make test    the whole test suite; 15 to 25 minutes"
	@echo "make lab     the notebooks in Jupyter"
	@echo "make check   formatting, lint, types, notebook pairs; half a minute"
	@echo "make format  put formatting, lint and notebook pairs right where a machine can"
	@echo "make bench   speed against peers, as ratios in one run; hours; needs MNIST and CIFAR-10 (hessnb data fetch)"
	@echo "make clean   remove what was built; keeps .venv and the results in the store"
	@echo "The first target also makes $(VENV), in 2 to 5 minutes."

env: $(VENV)/.complete

$(VENV)/.complete: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "hessnb needs Python 3.11 or newer; name one: make PYTHON=python3.12 ..." >&2; exit 2; }
	@echo "making the environment in $(VENV): 2 to 5 minutes, once"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[book,lab,test,dev]'
	@touch $@

book: env
	@echo "executing the notebooks with the profile $(PROFILE) and building the HTML: minutes the first time, seconds after"
	$(BIN)/hessnb book --profile $(PROFILE)

test: env
	@echo "running the tests: 15 to 25 minutes"
	$(BIN)/python -m pytest

lab: env
	$(BIN)/hessnb notebooks sync
	$(BIN)/jupyter lab --notebook-dir=notebooks

check: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hessnb notebooks check

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/hessnb notebooks sync

bench: env
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python tests/benchmarks/training_speed.py
	$(BIN)/python tests/benchmarks/curvature_speed.py --publish book/record/benchmarks.json
	$(BIN)/python tests/benchmarks/attack_speed.py --publish book/record/benchmarks.json

clean:
	rm -rf book/_build build *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
