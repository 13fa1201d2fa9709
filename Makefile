# make env        create .venv with what running takes, at the pinned versions; again only when pyproject.toml or
#                 constraints.txt changed, and anew if its Python is too old
# make dev        add what the tests and lint need; the targets below do it themselves
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
DEV_STAMP := $(VENV)/.installed-dev

.DEFAULT_GOAL := test
.PHONY: env dev demo test test-serve test-all soak test-gpu lint format clean

# Python, and pytest for the tests, keep what they have compiled: tests start many processes.
unexport PYTHONDONTWRITEBYTECODE

env: $(STAMP)

dev: $(DEV_STAMP)

# Exits with one sentence unless it is run by a Python that pyproject.toml allows.
CHECK_PYTHON := import sys; version = sys.version_info[:2]; \
	sys.exit(None if (3, 11) <= version <= (3, 13) else "Python 3.11 to 3.13 is needed (got %d.%d): " % version + \
	"name one that you have, as in make env PYTHON=python3.12")

# torch goes first and alone: with its version (from constraints.txt) in place before anything that depends on it is
# looked at, pip cannot settle on another build of it.
$(STAMP): pyproject.toml constraints.txt
	@$(BIN)/python -c '$(CHECK_PYTHON)' 2>/dev/null || { $(PYTHON) -c '$(CHECK_PYTHON)' && rm -rf $(VENV) && $(PYTHON) -m venv $(VENV); }
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e .
	touch $@

$(DEV_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test]"
	touch $@

demo: env
	$(BIN)/cosmos3 demo --checkpoint outputs/tiny-nano --out demo

test: dev
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow and not gpu and not serve"

test-serve: dev
	$(BIN)/python -m pytest -n $(WORKERS) -m "serve and not slow"

test-all: dev
	$(BIN)/python -m pytest -n $(WORKERS)

soak: dev
	test -d outputs/tiny-nano || $(BIN)/cosmos3 tiny-checkpoint outputs/tiny-nano
	$(BIN)/python -m tests.soak.fault_schedules outputs/tiny-nano outputs/soak/schedules
	$(BIN)/python -m tests.soak.kill_table outputs/tiny-nano outputs/soak/kills
	$(BIN)/python -m tests.soak.surroundings outputs/tiny-nano outputs/soak/surroundings
	$(BIN)/python -m tests.soak.head_attacks outputs/tiny-nano outputs/soak/attacks
	$(BIN)/python -m tests.soak.growth outputs/tiny-nano outputs/soak/growth

test-gpu: dev
	$(BIN)/python -m pytest -m gpu

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find cosmos3_core cluster deployments tests -name __pycache__ -type d -prune -exec rm -rf {} +
