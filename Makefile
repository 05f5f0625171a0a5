# Every target does its own set-up on a bare Python 3.11 or 3.12 with pip.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRA ?= cpu
UV := 0.13.9
PIP_AUDIT := 2.10.1
TRL := 1.16.0
MATPLOTLIB := 3.11.2

.PHONY: setup demo real ui deploy worker test test-ops bench lint audit clean

setup: $(VENV)/.ready-$(EXTRA)

# torch's CPU build comes from PIP_FIND_LINKS where a machine sets it, else from PyTorch's own index.
# Every engine is a process that imports torch and more: from bytecode in a third of the time, and some settings keep
# Python from writing it.
$(VENV)/.ready-$(EXTRA): requirements-$(EXTRA).lock
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v in ((3, 11), (3, 12)) else f"Python 3.11 or 3.12 is needed, this is {v}; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv==$(UV)
	$(BIN)/uv pip sync --quiet --compile-bytecode --python $(BIN)/python \
		$(if $(PIP_FIND_LINKS),--find-links "$(PIP_FIND_LINKS)",$(if $(filter cpu,$(EXTRA)),--torch-backend cpu)) $<
	rm -f $(VENV)/.ready-* && touch $@

demo: setup
	$(BIN)/python -m flows.recover demo-cpu

# Without SDD_DATA_ROOT and without that folder the data comes from the hub.
real: export SDD_DATA_ROOT ?= $(wildcard ../shared/data)
real: setup
	$(BIN)/python -m flows.recover smollm2-135m

ui: setup
	$(BIN)/python -m deployments.local

# A Prefect server of your own is used where PREFECT_API_URL names one, a store of your own where SDD_STORE does.
LOCAL := $(BIN)/python -m deployments.local

deploy: setup
	for pool in cpu gpu; do $(LOCAL) prefect --no-prompt work-pool create $$pool --type process --overwrite; done
	$(LOCAL) prefect --no-prompt deploy --prefect-file deployments/prefect.yaml --all
	$(LOCAL) python -m deployments.automations

worker: POOL ?= cpu
worker: setup
	$(LOCAL) prefect worker start --pool $(POOL) --type process --limit 1

test: setup lint
	$(BIN)/python -m pytest -q tests --ignore tests/ops

# Servers, workers and a browser (Chromium) as an operator has them; minutes each.
test-ops: setup
	$(BIN)/python -m pytest -q tests/ops

# trl is what fine-tuning is compared with, and nothing else needs it; what it needs is there. matplotlib draws.
bench: setup
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps trl==$(TRL)
	$(BIN)/uv pip install --quiet --python $(BIN)/python matplotlib==$(MATPLOTLIB)
	$(BIN)/python -m tests.benchmarks.stages
	$(BIN)/python -m tests.benchmarks.scaling

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# Known vulnerabilities of every package in the lock files. The database knows releases, not builds: no hashes, no +cpu.
# --strict: a package that could not be looked up is an error.
audit: setup
	for lock in requirements-*.lock; do $(BIN)/uv tool run pip-audit==$(PIP_AUDIT) --strict --disable-pip --no-deps \
		--requirement <(sed -e '/--hash=/d' -e 's/ \\$$//' -e 's/+cpu//' $$lock) || exit 1; done

clean:
	rm -rf $(VENV) .local
