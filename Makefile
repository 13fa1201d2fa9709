# make env        create .venv with the pinned versions (again only when pyproject.toml or constraints.txt changed)
# make test       the CPU tests (minutes), on one Ray at most
# make test-serve those that start most processes: the commands, README's blocks, restarts, gangs of four ranks
# make test-all   every test this machine can run
# make soak       long tries, each a table: schedules of faults, and under load kills, faults, attacks, growth
# make test-gpu   what needs GPUs, on those that this machine has; without pytest: python -m tests.gpu
# make lint       ruff and mypy, changing nothing     make format     let ruff rewrite
# make demo       the whole graph on this machine: a prompt over HTTP becomes demo.mp4, with a tiny random checkpoint
# make clean      remove .venv and caches

PYTHON ?= python3
# Tests wait more than they compute: four at a time take little more than half of the time of two on two cores. Each has
# about 1.5 GB, and up to three have a Ray as well.
WORKERS ?= 4
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := test
.PHONY: env demo test test-serve test-all soak test-gpu lint format clean

# Python, and pytest for the tests, keep what they have compiled: tests start many processes.
unexport PYTHONDONTWRITEBYTECODE

env: $(STAMP)

# torch goes first and alone: with its version (from constraints.txt) in place before anything that depends on it is
# looked at, pip cannot settle on another build of it.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test]"
	touch $@

demo: env
	$(BIN)/cosmos3 demo --checkpoint outputs/tiny-nano --out demo

test: env
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow and not gpu and not serve"

test-serve: env
	$(BIN)/python -m pytest -n $(WORKERS) -m "serve and not slow"

test-all: env
	$(BIN)/python -m pytest -n $(WORKERS)

soak: env
	test -d outputs/tiny-nano || $(BIN)/cosmos3 tiny-checkpoint outputs/tiny-nano
	$(BIN)/python -m tests.soak.fault_schedules outputs/tiny-nano outputs/soak/schedules
	$(BIN)/python -m tests.soak.kill_table outputs/tiny-nano outputs/soak/kills
	$(BIN)/python -m tests.soak.surroundings outputs/tiny-nano outputs/soak/surroundings
	$(BIN)/python -m tests.soak.head_attacks outputs/tiny-nano outputs/soak/attacks
	$(BIN)/python -m tests.soak.growth outputs/tiny-nano outputs/soak/growth

test-gpu: env
	$(BIN)/python -m pytest -m gpu

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find cosmos3_core cluster deployments tests -name __pycache__ -type d -prune -exec rm -rf {} +
