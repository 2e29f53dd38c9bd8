# The front door: `make demo` and `make test`, each from a fresh clone, do all the set-up by themselves.
PYTHON ?= python3
# The build of PyTorch: cpu, cu126, cu128, rocm6.4, … or auto; empty: keep what is there, else constraints-torch.txt.
TORCH ?=
VENV := .venv
TORCH_STAMP := $(TORCH:%=.venv/.torch-%)
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: install demo test unit lint mlflow gpu-check cluster cluster-down

install: $(VENV)/.installed

# A stamp that only a whole installation leaves: an interrupted one is done again. A PyTorch that is there is kept.
$(VENV)/.installed: pyproject.toml constraints.txt $(TORCH_STAMP) | $(VENV)/bin/pip
	$(BIN)/pip show --quiet torch 2>/dev/null || $(BIN)/pip install --progress-bar off --constraint constraints-torch.txt torch
	$(BIN)/pip install --progress-bar off --constraint constraints.txt --editable '.[dev]'
	touch $@

# uv knows where PyTorch publishes each of its builds.
$(VENV)/.torch-$(TORCH): | $(VENV)/bin/pip
	$(BIN)/pip install --progress-bar off --constraint constraints.txt uv
	$(BIN)/uv pip install --python $(BIN)/python --torch-backend '$(TORCH)' --reinstall-package torch torch
	rm -f $(VENV)/.torch-*
	touch $@

$(VENV)/bin/pip:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; try make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

demo: install
	python workflows/prepare.py scenes
	python workflows/launch.py --nodes 2 --gpus 8
	python workflows/generate.py latest
	python workflows/evaluate.py latest
	python analysis/report.py --runs latest --out reports/demo
	@echo
	@echo "Report:   reports/demo/index.html"
	@echo "Pictures: $$(python workflows/runs.py path latest)/pictures"
	@echo "MLflow:   make mlflow   (then open the address that it prints)"

test: install
	# The tests with a SLURM watch processes and clocks: they have the machine to themselves.
	python -m pytest tests/cluster
	python -m pytest -n auto --dist loadfile --no-loadscope-reorder --ignore tests/cluster

unit: install
	python -m pytest -n auto --dist loadfile -m 'not cluster and not integration'

lint: install
	ruff check .
	ruff format --check .
	mypy

mlflow: install
	python -m workflows.mlflow_ui $(PORT)

# A machine with a GPU may have no network: this installs nothing, and takes the Python that is there.
gpu-check:
	@if [ -x $(BIN)/python ]; then $(BIN)/python -m tests.gpu_check; else $(PYTHON) -m tests.gpu_check; fi

cluster: install
	python -m tests.testcluster up

cluster-down: install
	python -m tests.testcluster down
