# make run    environment, then the default recipe by `dvc repro`, then its scores
# make test   environment, then the tests            make lint   style, types, layers, bandit
# make audit  the lock against the databases of known vulnerabilities
# make chaos  200 kills, 1,000 spoilt files of every kind and a guided search for worse ones: one to two hours
# make bench  time and memory beside the peers, 15 to 25 minutes on 2 cores (QUICK=1: 5, no table; ONLY=curves: that part again)
# make methods  every recipe on a real model for a minute or less, into docs/methods.md (ONLY=sora: that row again)
# Elsewhere:  make run PYTHON=python3.12 TORCH_INDEX=https://download.pytorch.org/whl/cu130   (empty: PyPI's own build)

PYTHON ?= python3.11
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TESTS ?= tests
# For two cores: tests wait for servers and processes of their own a third of the time, what chaos starts does not.
WORKERS ?= 4
JOBS ?= 2

# Findings of `make audit` that do not reach this project, each with its reason in a comment here; none so far.
ACCEPTED :=

VENV := .venv
AUDIT := .venv-audit
BIN := $(CURDIR)/$(VENV)/bin
READY := $(VENV)/.ready
TORCH := $(shell grep '^torch==' requirements.lock)

# Stages are started as `python -m tasks.<stage>`: the environment's own python has to come first.
export PATH := $(BIN):$(PATH)
export DO_NOT_TRACK := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export HF_HUB_OFFLINE := 1
export MLFLOW_DISABLE_TELEMETRY := true
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export TOKENIZERS_PARALLELISM := false

.PHONY: run test chaos lint audit bench methods setup clean
.DEFAULT_GOAL := run

run: setup
	@$(BIN)/python -m flows.mend
	$(BIN)/dvc repro
	$(BIN)/python -m tasks.sync
	@$(BIN)/python -m tasks.show

test: setup
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(TESTS)

chaos: setup
	$(BIN)/python -m pytest -m chaos tests
	$(BIN)/python -m tests.chaos.kills --kills 200 --jobs $(JOBS)
	$(BIN)/python -m tests.chaos.kills --real --kills 6
	$(BIN)/python -m tests.chaos.fuzz --files 1000 --jobs $(JOBS)
	$(BIN)/python -m pip install --quiet --no-build-isolation -e '.[chaos]'
	echo params jsonl csv adapter_config checkpoint | xargs -n 1 -P $(JOBS) \
		$(BIN)/python -m tests.chaos.coverage_fuzz --runs 20000 --kind

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive cola_core tasks flows benchmarks conf

# Needs the network; --strict, since pip-audit else calls a package sound that it could not look up.
audit:
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --quiet pip-audit
	$(AUDIT)/bin/pip-audit --strict --disable-pip --no-deps --requirement requirements.lock $(foreach id,$(ACCEPTED),--ignore-vuln $(id))

bench: setup
	$(BIN)/python -m benchmarks $(if $(QUICK),--quick) $(foreach part,$(ONLY),--only $(part))

methods: setup
	$(BIN)/python -m benchmarks.methods every $(foreach recipe,$(ONLY),--only $(recipe))

setup: $(READY)

# torch first and alone: the second command then finds it installed, whatever index it came from.
# One short try of the index, since pip goes on without it where it cannot be reached.
# pip would compile 23,000 files on one core; to compile none would cost every process seconds where
# PYTHONDONTWRITEBYTECODE is set, as in many containers. Some packages hold templates that do not compile.
$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --no-compile --no-deps --retries 1 --timeout 15 $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(TORCH)
	$(BIN)/python -m pip install --no-compile -r requirements.lock
	$(BIN)/python -m pip install --no-deps --no-build-isolation -e .
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	touch $@

clean:
	rm -rf $(VENV) $(AUDIT) .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info
